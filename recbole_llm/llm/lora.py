"""LoRA adapters through peft's public API: attach, save, load, select, mix.

A mixture ``h = W x + sum_i w_i s_i B_i A_i x`` copies no weights: all its adapters are active, and each coefficient ``w_i``
is a tensor in peft's ``layer.scaling[name]``, through which gradients flow. :mod:`recbole_llm.merging.arithmetic` merges
adapters into one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from recbole_llm.llm.adapter_folders import WEIGHTS_FILE, check_same_base, factor_key, read_adapter
from recbole_llm.llm.folding import Folding
from recbole_llm.llm.identity import first_line
from recbole_llm.llm.lora_inputs import share_inputs
from recbole_llm.llm.lora_targets import beyond_text, check_targets, is_router, linear_layers
from recbole_llm.llm.memory import check_in_memory

if TYPE_CHECKING:
    from peft import PeftModel

Coefficient = float | Tensor | Mapping[str, Tensor]
"""A scalar for the whole adapter, or a scalar for each LoRA module by name."""


def attach_lora(
    model: nn.Module,
    *,
    name: str,
    r: int,
    lora_alpha: int,
    lora_dropout: float,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    seed: int,
) -> PeftModel:
    """Add an untrained adapter (``B = 0``) as the only active and trainable one.

    Dropout is drawn once for each distinct input of its layers, see :mod:`recbole_llm.llm.lora_inputs`.

    Args:
        model: a causal LM, or a PeftModel with other adapters.
        seed: of the initial ``A``; the global random state is preserved.

    Raises:
        ValueError: there is an adapter of that name, or peft cannot adapt these modules, or as no exact ``s B A``.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = LoraConfig(
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        exclude_modules=beyond_text(base),
        use_rslora=use_rslora,
    )
    check_in_memory(model)
    check_targets(base, target_modules)
    listed = f"give a list of linear layers, such as {linear_layers(base)}"
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if not isinstance(model, PeftModel):
            try:
                found = get_peft_model(model, config, adapter_name=name)
            except ValueError as error:  # no such modules, or weights of several experts with dropout
                kinds = f"target_modules: {target_modules} with lora_dropout: {lora_dropout}"
                raise ValueError(f"{kinds}: peft cannot adapt {type(model).__name__} ({first_line(error)}); {listed}") from error
            if config.target_parameters:  # peft's translation of all-linear; read_adapter refuses such an adapter
                raise ValueError(
                    f"target_modules: {target_modules}: {type(model).__name__} keeps the weights of its experts in one tensor "
                    f"({', '.join(sorted(config.target_parameters))}), whose updates cannot be merged; {listed}"
                )
            if routers := [name for name, layer in lora_modules(found).items() if is_router(layer.get_base_layer())]:
                raise ValueError(
                    f"target_modules: {target_modules}: {type(model).__name__} chooses experts by {routers[0]}, which returns "
                    f"more than a product and takes no LoRA; {listed}"
                )
            share_inputs(lora_modules(found).values())
            return found
        if name in model.peft_config:
            raise ValueError(f"adapter {name!r} is already attached; attached are {sorted(model.peft_config)}")
        AdapterView(model).select()  # ends a folding
        del _SELECTIONS[model]
        model.add_adapter(name, config)
    share_inputs(lora_modules(model).values())
    _tuner(model).enable_adapter_layers()
    model.set_adapter(name)  # peft also makes it trainable
    return model


# -- folders -----------------------------------------------------------------------------------------------------------


def save_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Write one adapter as an ordinary PEFT folder that ``PeftModel.from_pretrained(base, folder)`` reads."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    _check_names(model, [name])
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    config: Any = copy.copy(model.peft_config[name])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the order of a set differs between processes
    config.save_pretrained(str(folder))


def load_adapters(model: nn.Module, folders: Mapping[str, Path]) -> PeftModel:
    """Load several adapters into one model, frozen, in eval mode; the first is active. Target modules may differ.

    Raises:
        FileNotFoundError: a folder is not a PEFT folder.
        ValueError: two adapters differ in base model, one does not fit ``model``, or as
            :func:`~recbole_llm.llm.adapter_folders.read_adapter`.
    """
    from peft import PeftModel

    check_in_memory(model)
    keys = _checked_keys(folders)
    for name, folder in folders.items():
        if isinstance(model, PeftModel):
            if name in model.peft_config:
                raise ValueError(f"adapter {name!r} is already loaded; give {folder} another name")
            model.load_adapter(str(folder), adapter_name=name)
            _SELECTIONS.pop(model, None)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        # not peft's get_peft_model_state_dict: it leaves out layers that are named like another adapter, as 0 or model
        loaded: Any = model
        targeted = [module for module, layer in lora_modules(loaded).items() if name in layer.scaling]
        expected = {factor_key(module, factor) for module in targeted for factor in "AB"}
        if expected != keys[name]:
            odd = min(expected ^ keys[name])
            raise ValueError(f"adapter {name!r} in {folder} does not fit this model: only one of them has {odd}")
    share_inputs(lora_modules(model).values())  # type: ignore[arg-type]
    AdapterView(model, {next(iter(folders)): 1.0}).select()  # type: ignore[arg-type]
    return model.eval()  # type: ignore[return-value]


@contextmanager
def adapters_loaded(model: nn.Module, folders: Mapping[str, Path]) -> Iterator[PeftModel]:
    """In this block, ``model`` has the adapters of :func:`load_adapters`; afterwards, it is as before."""
    found = load_adapters(model, folders)
    try:
        yield found
    finally:
        unload(found)


def _checked_keys(folders: Mapping[str, Path]) -> dict[str, set[str]]:
    """The tensors of each adapter by name, after checking each and that their base models are the same."""
    if not folders:
        raise ValueError("no adapter to load: folders is empty")
    adapters = {name: read_adapter(folder, name) for name, folder in folders.items()}
    first, *others = adapters.values()
    for other in others:
        check_same_base(first, other)
    return {name: set(adapter.tensors) for name, adapter in adapters.items()}


# -- selection and mixture ---------------------------------------------------------------------------------------------


def lora_modules(model: PeftModel) -> dict[str, Any]:
    """peft's LoRA layers by module name within the base model, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in _tuner(model).model.named_modules() if isinstance(layer, LoraLayer)}


class AdapterView:
    """A causal LM with a mixture of its adapters: ``W x + sum_i w_i s_i B_i A_i x``.

    Views of one model share its weights. Each call selects the view's own adapters first, so results do not depend on calls
    of other views.

    Args:
        model: a causal LM with loaded adapters.
        adapters: name -> coefficient: a scalar, or {module -> scalar tensor}. Tensors receive gradients; tensors on the CPU
            work for modules on any device. Without adapters, the view is the base model.
        fold: without gradients, run on weights with the mixture folded in where :class:`Folding` can: a forward pass then costs
            that of the base model, and results differ by the rounding of a weight.

    Raises:
        ValueError: an unknown adapter, or per-module coefficients that lack a module of the adapter or name none of the model.
    """

    def __init__(self, model: PeftModel, adapters: Mapping[str, Coefficient] | None = None, *, fold: bool = False):
        self.model, self.adapters, self._fold = model, dict(adapters or {}), fold
        _check_names(model, self.adapters)
        self._layers = lora_modules(model)
        for name, coefficient in self.adapters.items():
            targeted = {module for module, layer in self._layers.items() if name in layer.scaling}
            if not isinstance(coefficient, Mapping):
                continue
            if odd := (targeted - set(coefficient)) | (set(coefficient) - set(self._layers)):  # others may have more modules
                raise ValueError(f"coefficients of adapter {name!r} must name its modules; {min(odd)!r} does not match")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, as in ``transformers``."""
        self.select()
        return self.model(*args, **kwargs)

    def select(self) -> None:
        """Make this view's adapters the active ones of the model; does nothing if they are."""
        state = _SELECTIONS.setdefault(self.model, _Selection())
        fold = self._fold and not torch.is_grad_enabled() and bool(self.adapters) and self._foldable(state)
        chosen = fold, [(name, _value(coefficient)) for name, coefficient in self.adapters.items()]
        if state.chosen == chosen and not any(tensor.requires_grad for tensor in self._tensors()):
            return
        state.chosen = None  # until all is done
        if state.folding is not None and state.folding.active and not fold:
            state.folding.restore()
        self._activate(state, () if fold else tuple(self.adapters))
        for module, layer in self._layers.items():
            for name, coefficient in self.adapters.items():
                if name in layer.scaling:
                    layer.set_scale(name, coefficient[module] if isinstance(coefficient, Mapping) else coefficient)
        if fold and state.folding is not None:
            state.folding.fold(self.adapters)
        state.chosen, state.coefficients = chosen, self.adapters

    def _activate(self, state: _Selection, names: tuple[str, ...]) -> None:
        if state.active == names:
            return
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        tuner = _tuner(self.model)
        if names:
            tuner.enable_adapter_layers()
            tuner.set_adapter(list(names))
        else:
            tuner.disable_adapter_layers()
        for parameter, flag in flags:  # peft makes active adapters trainable
            parameter.requires_grad_(flag)
        state.active = names

    def _foldable(self, state: _Selection) -> bool:
        if state.folding is None:
            state.folding = Folding(_tuner(self.model).model, self._layers)
        return state.folding.possible

    def _tensors(self) -> Iterable[Tensor]:
        for coefficient in self.adapters.values():
            found = coefficient.values() if isinstance(coefficient, Mapping) else [coefficient]
            yield from (value for value in found if isinstance(value, Tensor))

    def selected(self) -> Any:
        """The causal LM of ``transformers``, in which this view's adapters are active until another view is called."""
        self.select()
        return self.model.get_base_model()

    @property
    def config(self) -> Any:
        """The configuration of the base model."""
        return self.model.config

    def get_input_embeddings(self) -> Any:
        """The input embeddings of the base model."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The ``lm_head`` of the base model."""
        return self.model.get_output_embeddings()


def unload(model: PeftModel) -> None:
    """Remove all adapters; the base model has its own weights afterwards."""
    if (state := _SELECTIONS.pop(model, None)) is not None and state.folding is not None and state.folding.active:
        state.folding.restore()
    model.unload()


@dataclass
class _Selection:
    """What the last view of a model has selected; None if unknown."""

    active: tuple[str, ...] | None = None
    chosen: Any = None  # whether adapters are folded, and their coefficients as _value describes them
    coefficients: Any = None  # keeps the tensors among them, so that no other tensor gets their ids
    folding: Folding | None = None


_SELECTIONS: WeakKeyDictionary[Any, _Selection] = WeakKeyDictionary()


def _value(coefficient: Coefficient) -> Any:
    """A number, or the identity of a tensor and its version, which changes when it is written to."""
    if isinstance(coefficient, Mapping):
        return {module: _value(value) for module, value in coefficient.items()}
    return (id(coefficient), coefficient._version) if isinstance(coefficient, Tensor) else coefficient


def _tuner(model: PeftModel) -> Any:
    return model.base_model  # peft's LoraModel: unlike PeftModel, it allows several active adapters


def _check_names(model: PeftModel, names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise ValueError(f"no adapter named {unknown}; loaded are {sorted(model.peft_config)}")
