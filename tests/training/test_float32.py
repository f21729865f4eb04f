"""Products of float32 matrices keep their accuracy on a CPU."""

from collections.abc import Iterator

import pytest
import torch

from recbole_llm.training import float32
from recbole_llm.training.float32 import onednn_is_exact, set_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    onednn_is_exact.cache_clear()
    yield
    torch.set_float32_matmul_precision(before)
    onednn_is_exact.cache_clear()


@pytest.mark.parametrize(
    ("value", "width", "exact", "expected"),
    [
        ("high", 576, True, "medium"),
        ("medium", 576, True, "medium"),
        ("highest", 576, True, "highest"),
        ("high", 128, True, "highest"),
        ("medium", 576, False, "highest"),
    ],
)
def test_a_cpu_uses_onednn_for_wide_products_where_it_is_exact(
    value: str, width: int, exact: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32, "onednn_is_exact", lambda: exact)
    torch.set_float32_matmul_precision("high")
    set_precision(value, CPU, width)
    assert torch.get_float32_matmul_precision() == expected


def test_products_have_the_accuracy_of_float32_after_every_choice() -> None:
    x, w = torch.randn(300, 700), torch.randn(700, 200)
    exact = x.double() @ w.double()
    for value in float32.CHOICES:
        set_precision(value, CPU, 576)
        assert float((x @ w - exact).norm() / exact.norm()) < 1e-5


def test_rounding_to_bfloat16_is_found_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            return product(a.bfloat16(), b.bfloat16()).float()
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not onednn_is_exact()


def test_the_check_changes_neither_the_setting_nor_random_numbers() -> None:
    torch.set_float32_matmul_precision("high")
    state = torch.get_rng_state()
    onednn_is_exact()
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_value_is_named() -> None:
    with pytest.raises(ValueError, match="float32_matmul_precision: 'low'"):
        set_precision("low", CPU, 576)
