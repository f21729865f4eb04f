"""What each of several processes computes and sees; that they exchange it is pretended here, and tested in tests/end_to_end."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from several import Pretended, exit_codes, start
from torch import nn

from recbole_llm import compat
from recbole_llm.cli.errors import fail, of_process, tells
from recbole_llm.store import processes
from recbole_llm.store.contexts import holding
from recbole_llm.store.launcher import asks_for_fsdp, choose_accelerator, refuse
from recbole_llm.store.processes import ALONE, Processes, alone, current, joined, undivided

FSDP = {  # what accelerate launch --use_fsdp sets
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_without_a_launcher_there_is_one_process_and_nothing_is_drawn():
    assert compat.launched({}) == (0, 1) and compat.launched(LAUNCHED) == (1, 2)
    assert compat.launched({**LAUNCHED, "MASTER_ADDR": ""}) == (0, 1)
    with joined() as found:
        assert found is current() and found == ALONE and found.main
        state = torch.get_rng_state()
        with found.randomness("part"):
            torch.rand(3)
        assert not torch.equal(state, torch.get_rng_state())  # as in a run of an earlier state
        assert found.gather("a") == ["a"] and found.agree(2) == 2
    assert tells() and of_process("x") == "x"


def test_a_process_that_meets_nobody_ends_and_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    """The other one dies before it joins; without a launcher that ends both, one would wait for a day."""

    def join() -> None:
        processes.JOINING = timedelta(seconds=1)
        if compat.launched()[0] == 0:
            raise SystemExit(7)
        try:
            with joined():
                pass
        except ConnectionError as error:
            fail(of_process(str(error)))

    assert exit_codes(start(join), 60) == [7, 2]
    said = capfd.readouterr().err
    assert "error: process 1 of 2: the other processes of this run were not met at 127.0.0.1:" in said and "start all 2" in said


def test_every_call_is_computed_by_one_process_and_all_of_them_with_gradients():
    done = []

    def call(number):
        done.append(number)
        return torch.tensor([float(number)])

    calls = [lambda number=number: call(number) for number in range(5)]
    assert torch.cat(ALONE.compute(calls, torch.device("cpu"))).tolist() == [0, 1, 2, 3, 4] and len(done) == 5
    done.clear()
    Processes.compute(Pretended(1, 2), calls, torch.device("cpu"))
    assert done == [0, 1, 2, 3, 4]  # gradients are recorded
    done.clear()
    with torch.no_grad(), holding(processes._current, Pretended(1, 2)), undivided():
        Processes.compute(current(), calls, torch.device("cpu"))
    assert done == [0, 1, 2, 3, 4]
    dealt = []
    for rank in range(3):
        done.clear()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes.dist, "broadcast", lambda flat, owner: None)
            patch.setattr(Pretended, "gather", lambda self, shapes: [[[1]] * 2, [[1]] * 2, [[1]]])
            found = Processes.compute(Pretended(rank, 3), calls, torch.device("cpu"))
        assert [float(found[number]) for number in done] == [float(number) for number in done] and len(found) == 5
        dealt += done
    assert sorted(dealt) == [0, 1, 2, 3, 4]


def test_the_draws_of_a_part_are_its_own_and_leave_the_shared_state():
    torch.manual_seed(7)
    shared, drawn = torch.get_rng_state(), []
    for rank, part in ((0, ("lora", 3, 0)), (1, ("lora", 3, 1)), (1, ("lora", 3, 1)), (0, ("lora", 4, 0))):
        with Pretended(rank, 2).randomness(*part):
            drawn.append(float(torch.rand(())))
        assert torch.equal(torch.get_rng_state(), shared)
    assert drawn[1] == drawn[2] and len({*drawn}) == 3


def test_a_gradient_that_no_process_has_stays_away():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    (used * 3).sum().backward()
    Pretended(0, 2).add_gradients([used, unused, frozen])
    assert used.grad is not None and used.grad.tolist() == [3, 3] and unused.grad is None and frozen.grad is None


def test_alone_divides_nothing(monkeypatch):
    with holding(processes._current, Pretended(1, 2)):
        assert current().size == 2
        with alone():
            assert current() is ALONE
        assert current().size == 2


@pytest.mark.parametrize(
    ("environment", "size", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 2, "DeepSpeed is not supported .*--use_fsdp"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, 2, "--use_fsdp: fsdp_offload_params true is not supported; .*more processes"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, 2, "fsdp_sharding_strategy SHARD_GRAD_OP .*give FULL_SHARD"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, 2, "fsdp_reshard_after_forward false"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, 2, "give false, and --gradient_checkpointing=True"),
        ({**FSDP, "FSDP_IGNORED_MODULES": "lm_head"}, 2, "fsdp_ignored_modules lm_head is not supported; remove it"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 2, "mixed_precision bf16 is not supported; .*--dtype=bfloat16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, 2, "dynamo_backend INDUCTOR"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, 1, "starts one process, .* torchrun --nproc-per-node"),
    ],
)
def test_what_accelerate_would_do_and_this_package_does_not_is_refused(environment, size, said):
    with pytest.raises(ValueError, match=said):
        refuse(environment, size)


def test_ordinary_settings_of_accelerate_are_accepted():
    refuse({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}, 2)
    refuse({"ACCELERATE_USE_CPU": "True"}, 1)
    refuse(FSDP, 2)
    refuse({**FSDP, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, 2)
    assert asks_for_fsdp(FSDP) and not asks_for_fsdp({"ACCELERATE_USE_FSDP": "false"}) and not asks_for_fsdp({})


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({"LOCAL_RANK": "1"}, "1"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}, "6"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"LOCAL_RANK": "1", "ACCELERATE_USE_CPU": "true"}, ""),
    ],
)
def test_each_process_sees_its_own_accelerator(environment, seen):
    choose_accelerator(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == seen


def test_a_run_on_the_cpu_sees_none():
    choose_accelerator(environment := {"LOCAL_RANK": "1"}, none=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_more_processes_than_accelerators_are_refused():
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=3: process 1 of this machine has no accelerator"):
        choose_accelerator({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3"})


def test_before_they_have_joined_the_first_process_tells(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.0)
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    assert not tells() and of_process("no memory") == "process 1 of 2: no memory"
    monkeypatch.setenv("RANK", "0")
    assert tells() and of_process("no memory") == "no memory"
