"""What ``accelerate launch`` and ``torchrun`` ask of a process by its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

FSDP_OPTIONS = {  # of accelerate: the values that are followed, and the remedy for others
    "FSDP_OFFLOAD_PARAMS": (("false",), "weights stay on the accelerators; start more processes"),
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "give FULL_SHARD"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard"), "give true"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "give false, and --gradient_checkpointing=True"),
    "FSDP_IGNORED_MODULES": ((), "remove it"),
}


def refuse(environment: Mapping[str, str], size: int) -> None:
    """Refuse what ``accelerate`` would do and this package does not.

    Raises:
        ValueError: names the setting and the remedy.
    """
    if size == 1 and environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and environment.get("MASTER_ADDR"):
        raise ValueError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; for several on a CPU, use torchrun "
            "--nproc-per-node=N"
        )
    remedy = (
        "for a backbone that does not fit on one accelerator, give --use_fsdp or --load_in_4bit=True, or one process and "
        "--device_map=auto"
    )
    kinds = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "PARALLELISM_CONFIG": "a parallelism_config"}
    for key, name in kinds.items():
        if environment.get(f"ACCELERATE_USE_{key}", "false").lower() == "true":
            raise ValueError(f"accelerate launch: {name} is not supported ({remedy})")
    for key, (followed, instead) in FSDP_OPTIONS.items() if asks_for_fsdp(environment) else ():
        if key in environment and environment[key].lower() not in followed:
            raise ValueError(f"accelerate launch --use_fsdp: {key.lower()} {environment[key]} is not supported; {instead}")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ValueError(f"accelerate launch: mixed_precision {precision} is not supported; remove it, and give --dtype=bfloat16")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(f"accelerate launch: dynamo_backend {backend} is not supported; remove it")


def asks_for_fsdp(environment: Mapping[str, str]) -> bool:
    """Whether ``accelerate launch`` was given ``--use_fsdp``, or a configuration that says so."""
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def choose_accelerator(environment: dict[str, str] | os._Environ[str], *, none: bool = False) -> None:
    """Let this process see its own accelerator alone, so that it is ``cuda`` everywhere; none with ``accelerate launch --cpu``.

    Args:
        none: the run uses no accelerator.

    Raises:
        ValueError: there are fewer accelerators than processes.
    """
    if none or environment.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        return
    local, visible = int(environment.get("LOCAL_RANK", "0")), environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        environment["CUDA_VISIBLE_DEVICES"] = str(local)
    elif visible:
        listed = visible.split(",")
        if local >= len(listed):
            raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: process {local} of this machine has no accelerator; start fewer")
        environment["CUDA_VISIBLE_DEVICES"] = listed[local]
