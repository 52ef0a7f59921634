"""Which model is it, and which of its matrices can be pruned?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raymask.core.errors import UserError, first_line
from raymask.core.masks import Mask, matching
from raymask.core.spec import QUICKSTART, Model
from raymask.core.tensors import Packed, pack
from raymask.train import quickstart
from raymask.train.kernels import kernels_for
from raymask.train.objectives import OBJECTIVES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What a spec calls the types of weights."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of the prunable matrices, of the blocks they stand in (the encoder), and of the whole model."""

    prunable: int
    encoder: int
    whole: int

    def sparsities(self, pruned: int) -> dict[str, float]:
        """Share of zeros in all three denominators when `pruned` weights are gone."""
        return {name: pruned / getattr(self, name) for name in ("prunable", "encoder", "whole")}


@dataclass(frozen=True)
class Source:
    """A model without its weights: configuration, tokenizer, and what can be pruned: `shapes` (n_out, n_in) by name.

    `kind`: a spec's task.kind.
    """

    config: Any
    tokenizer: Any
    shapes: dict[str, tuple[int, ...]]
    sizes: Sizes
    kind: str = "classification"

    @property
    def prunable(self) -> tuple[str, ...]:
        return tuple(self.shapes)


def read_config(model: Model) -> tuple[Any, Any]:
    """Configuration and tokenizer, without the weights. Raises UserError when there are none."""
    from transformers import AutoConfig, AutoTokenizer

    if model.name == QUICKSTART:
        return quickstart.config(), quickstart.tokenizer()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(model.name, **options), AutoTokenizer.from_pretrained(model.name, **options)
    except Exception as error:  # noqa: BLE001 - transformers and the hub each raise their own kinds
        raise UserError(unloadable(model, error)) from None


def positions(config: Any, kind: str = "classification") -> int:
    """How many tokens a model of this configuration takes at least; some encoders count from behind padding's id."""
    found = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
    return found if kind == "causal-lm" else found - 1 - (getattr(config, "pad_token_id", None) or 0)


def vocabulary(config: Any) -> int:
    """How many token ids a model of this configuration knows."""
    return int(getattr(config, "vocab_size", None) or sys.maxsize)


def class_names(config: Any) -> tuple[str, ...]:
    """The classes that a checkpoint's own classifier knows, in the order of their numbers."""
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items()))


def describe(
    model: Model,
    config: Any,
    tokenizer: Any,
    classes: tuple[str, ...],
    kind: str | None = None,
    *,
    checkpointing: bool = False,
) -> Source:
    """The model that a configuration gives for these classes (none: a regression) or this `kind`, without memory.

    Raises UserError when there is no such model, nothing in it to prune, or no `checkpointing` though it is asked for.
    """
    kind = kind or ("classification" if classes else "regression")
    config.dtype = DTYPES[model.dtype]
    if kind != "causal-lm":
        config.num_labels = len(classes) or 1
        config.problem_type = "single_label_classification" if classes else "regression"
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    try:
        with torch.device("meta"):
            module = build(config, model.trust_remote_code, kind=kind)
    except Exception as error:  # noqa: BLE001 - transformers raises its own kinds
        made = "causal language model" if kind == "causal-lm" else "sequence classifier"
        raise UserError(f"model.name: {model.name} makes no {made}: {first_line(error)}") from None
    if checkpointing:
        try:
            checkpoint_activations(module, torch.device("meta"))
        except ValueError:
            raise UserError(
                f"checkpointing: {model.name} has no way to compute its activations again: take it out, and lower "
                "batch_size of dense, probe and finetune where memory is short"
            ) from None
    prunable = find_prunable(module, model.include, model.exclude)
    if not prunable:
        chosen = ": model.include and model.exclude leave none" if model.include or model.exclude else ""
        raise UserError(f"model: no matrix of {model.name} can be pruned{chosen}")
    shapes = {name: tuple(weight.shape) for name, weight in matrices(module, prunable).items()}
    return Source(config, tokenizer, shapes, count_sizes(module, prunable), kind)


def load_weights(model: Model, config: Any, seed: int, fine_tuned: bool, kind: str = "classification") -> Packed:
    """The checkpoint's weights, in `model.dtype`; a head that it lacks is drawn from the seed.

    `fine_tuned`: the head must be there too. Raises UserError when the weights cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(config) if model.name == QUICKSTART else load_module(model, config, fine_tuned, kind)
    return pack(persistent(module))


def load_module(model: Model, config: Any, fine_tuned: bool, kind: str) -> nn.Module:
    """The checkpoint in `model.dtype`; only safetensors, never a pickle."""
    try:
        with quiet():
            module, report = auto_class(kind).from_pretrained(
                model.name,
                config=config,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                dtype=DTYPES[model.dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, with their shapes
            )
    except Exception as error:  # noqa: BLE001 - see above
        raise UserError(unloadable(model, error)) from None
    for key, there, needed in report["mismatched_keys"]:
        cause = "Its head was made for other classes: start from the model without it"
        if kind == "causal-lm":
            cause = "Its config.json is another model's"
        raise UserError(
            f"model.name: {model.name} cannot be loaded: its {key} has shape {tuple(there)}, this task needs "
            f"{tuple(needed)}. {cause}"
        )
    missing = set(report["missing_keys"])
    body = f"{module.base_model_prefix}."
    lost = sorted(key for key in missing if key.startswith(body) and ".pooler." not in key)
    if lost:
        raise UserError(f"model.name: {model.name} has no weights for {lost[0]} and {len(lost) - 1} more of its body")
    if fine_tuned and missing:
        raise UserError(
            f"model.name: {model.name} is taken as fine-tuned (eval, and dense.epochs: 0), but it lacks "
            f"{', '.join(sorted(missing))}"
        )
    if kind == "causal-lm" and looks_ahead(module):
        raise UserError(f"model.name: {model.name} is no causal language model: it sees what it has to predict")
    return module  # type: ignore[no-any-return]


@torch.no_grad()
def looks_ahead(module: nn.Module) -> bool:
    """Whether what it says of a token depends on the next one, as an encoder's does."""
    ids = torch.tensor([[0, 0], [0, 1]])
    first, other = module.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()
    return bool((first - other).abs().max() > 0.02 * first.std())  # less is rounding, in bf16


def auto_class(kind: str) -> Any:
    """The class of transformers that makes models for such tasks."""
    import transformers

    return getattr(transformers, OBJECTIVES[kind].auto_class)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and remarks: that a head is new is expected, what matters is checked."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def unloadable(model: Model, error: BaseException) -> str:
    """Why a model could not be loaded, in one line, and what to do about it."""
    if "custom code" in str(error):
        advice = "it brings code of its own, which runs only with model.trust_remote_code: true"
    elif Path(model.name).exists():
        advice = "the folder needs config.json, model.safetensors and a tokenizer"
    else:
        advice = "it is neither a folder here nor reachable on the hub: check the name, or the network"
    return f"model.name: {model.name} cannot be loaded: {advice} ({first_line(error)})"


def build(
    config: Any, trust_remote_code: bool = False, *, kind: str = "classification", show_attention: bool = False
) -> nn.Module:
    """A model of this configuration, in its dtype, with new weights; `show_attention` lets it return attention
    probabilities."""
    return auto_class(kind).from_config(  # type: ignore[no-any-return]
        config,
        trust_remote_code=trust_remote_code,
        attn_implementation="eager" if show_attention else None,
    )


def checkpoint_activations(module: Any, device: torch.device) -> None:
    """Let a model keep no more than its layers' inputs for the backward pass, which computes the rest again.

    Results stay the same: there are the same kernels again, and the same random state, so that dropout falls as it
    fell. Raises ValueError when the model's layers are not made for it.
    """
    kernels = kernels_for(module, device)
    options = {"use_reentrant": False, "preserve_rng_state": True, "context_fn": lambda: (nullcontext(), kernels())}
    # the older name warns where there is the newer one
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable(options)


def persistent(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, each once: what a snapshot holds. They alias the live module."""
    saved = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}


def blocks(module: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of blocks of one class that hold linear layers: encoder or decoder layers, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, child in module.named_modules():
        outermost = not any(name.startswith(f"{outer}.") for outer in found)
        repeated = isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1
        if repeated and outermost and any(map(is_linear, child.modules())):
            found[name] = child
    return found


def block_parameters(module: nn.Module) -> set[str]:
    """Names of all parameters inside the blocks."""
    names = tuple(f"{name}." for name in blocks(module))
    return {name for name, _ in module.named_parameters() if name.startswith(names)}


def find_prunable(module: nn.Module, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the weights to prune, in the module's order: the linear ones inside its blocks.

    `include` and `exclude` are shell-style patterns; `include` chooses among all linear weights instead.
    """
    own = dict(module.named_parameters())  # a tied weight goes by one name only
    linear = [f"{name}.weight" for name, child in module.named_modules() if is_linear(child)]
    linear = [name for name in linear if name in own]
    chosen = matching(linear, include) if include else set(linear) & block_parameters(module)
    chosen -= matching(linear, exclude)
    return tuple(name for name in linear if name in chosen)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies by one matrix, whichever way round it keeps it."""
    return isinstance(layer, nn.Linear) or is_turned(layer)


def is_turned(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as (n_in, n_out), as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def turned(module: nn.Module) -> frozenset[str]:
    """Names of the weights that are kept as (n_in, n_out)."""
    return frozenset(f"{name}.weight" for name, layer in module.named_modules() if is_turned(layer))


def matrices(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of these names as (n_out, n_in), views of the module's own."""
    found, other = {name: module.get_parameter(name).detach() for name in names}, turned(module)
    return {name: weight.T if name in other else weight for name, weight in found.items()}


def as_kept(module: nn.Module, mask: Mask) -> Mask:
    """A mask of such matrices, each the way round in which the module keeps its weight."""
    other = turned(module)
    return {name: bits.T.contiguous() if name in other else bits for name, bits in mask.items()}


def count_sizes(module: nn.Module, prunable: tuple[str, ...], count: Callable[[Tensor], int] = Tensor.numel) -> Sizes:
    """Parameters in the three denominators, all or those that `count` counts; the encoder is never smaller than what is
    pruned."""
    sizes = {name: count(parameter) for name, parameter in module.named_parameters()}
    inside = block_parameters(module) | set(prunable)
    return Sizes(
        prunable=sum(sizes[name] for name in prunable),
        encoder=sum(sizes[name] for name in inside),
        whole=sum(sizes.values()),
    )
