"""Model loading: configuration, tokenizer, weights, and modules built from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raymask.core.errors import UserError, first_line
from raymask.core.spec import QUICKSTART, Model
from raymask.core.tensors import PackedTensors, pack
from raymask.data import quickstart
from raymask.train.cpu_kernels import cpu_kernels
from raymask.train.losses import TASK_LOSSES
from raymask.train.prunable import Sizes, block_parameters, count_sizes, find_prunable, fused_parameters, matrices

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Weight dtypes by the spec's model.dtype."""

MAX_FUSED_SHARE = 0.25  # of the blocks' weights in parameters that cannot be pruned, such as XLNet's attention


@dataclass(frozen=True)
class ModelInfo:
    """A model without its weights.

    Attributes:
        config: The transformers configuration.
        shapes: Shapes (n_out, n_in) of the prunable matrices by name, (n_experts, n_out, n_in) of experts.
        sizes: Numbers of parameters.
        kind: The spec's task.kind.
        left_out: Shapes of the other parameters in the transformer blocks, by name.
    """

    config: Any
    shapes: dict[str, tuple[int, ...]]
    sizes: Sizes
    kind: str = "classification"
    left_out: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def prunable(self) -> tuple[str, ...]:
        """Names of the prunable weights."""
        return tuple(self.shapes)


def read_config(model: Model) -> tuple[Any, Any]:
    """Load a model's configuration and tokenizer, without its weights.

    Raises:
        UserError: They cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    if model.name == QUICKSTART:
        return quickstart.config(), quickstart.tokenizer()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(model.name, **options), AutoTokenizer.from_pretrained(model.name, **options)
    except Exception as error:  # noqa: BLE001 - transformers and the hub each raise their own errors
        raise UserError(load_error_message(model, error)) from None


def inspect_model(
    model: Model,
    config: Any,
    classes: tuple[str, ...],
    kind: str | None = None,
    *,
    gradient_checkpointing: bool = False,
) -> ModelInfo:
    """Build a model without memory and find its prunable matrices.

    The configuration is changed in place: dtype, and for classification and regression labels and problem type.

    Args:
        model: The spec's model section.
        config: The transformers configuration.
        classes: Class names in the order of their numbers; empty for a regression or a language model.
        kind: The spec's task.kind; None for classification or regression, depending on `classes`.
        gradient_checkpointing: Check that the model supports gradient checkpointing.

    Raises:
        UserError: The configuration does not give a model for this task, there is nothing to prune, or the model does
            not support gradient checkpointing.
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
            module = build_model(config, model.trust_remote_code, kind=kind)
    except Exception as error:  # noqa: BLE001 - transformers raises its own errors
        model_type = "causal language model" if kind == "causal-lm" else "sequence classifier"
        raise UserError(f"model.name: {model.name} cannot be built as a {model_type}: {first_line(error)}") from None
    if gradient_checkpointing:
        try:
            checkpoint_activations(module, torch.device("meta"))
        except ValueError:
            raise UserError(
                f"gradient_checkpointing: {model.name} does not support it: remove it, and lower batch_size in dense, "
                "early_eval and finetune if memory runs out"
            ) from None
    prunable = choose_prunable(model, module)
    shapes = {name: tuple(weight.shape) for name, weight in matrices(module, prunable).items()}
    left_out = {
        name: tuple(module.get_parameter(name).shape) for name in sorted(block_parameters(module) - set(prunable))
    }
    return ModelInfo(config, shapes, count_sizes(module, prunable), kind, left_out)


def choose_prunable(model: Model, module: nn.Module) -> tuple[str, ...]:
    """Names of the weights to prune, as the spec's model section chooses them.

    Raises:
        UserError: There are none, a pattern matches nothing, or much of the blocks is in parameters of a form that
            cannot be pruned and the spec does not choose others.
    """
    try:
        prunable = find_prunable(module, model.include, model.exclude)
    except ValueError as error:
        raise UserError(f"model.{error}") from None
    if not prunable:
        cause = ": model.include and model.exclude leave none" if model.include or model.exclude else ""
        raise UserError(f"model: no matrix of {model.name} can be pruned{cause}")
    fused = fused_parameters(module)
    share = sum(fused.values()) / max(sum(module.get_parameter(name).numel() for name in block_parameters(module)), 1)
    if share > MAX_FUSED_SHARE and not model.include:
        raise UserError(
            f"model.name: {model.name} holds {share:.0%} of the weights of its blocks in parameters of three "
            f"dimensions, such as {next(iter(fused))}, which raymask does not prune. model.include: ['*'] prunes its "
            "linear layers alone"
        )
    return prunable


def load_weights(model: Model, config: Any, seed: int, fine_tuned: bool, kind: str = "classification") -> PackedTensors:
    """Load a checkpoint's weights in `model.dtype`. A missing head is initialised from the seed.

    Args:
        model: The spec's model section.
        config: The transformers configuration.
        seed: Seeds the weights of a missing head, and all weights of the quickstart's model.
        fine_tuned: The checkpoint must have the head too.
        kind: The spec's task.kind.

    Returns:
        Parameters and saved buffers by name.

    Raises:
        UserError: The weights cannot be loaded or do not fit the task.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_model(config) if model.name == QUICKSTART else load_module(model, config, fine_tuned, kind)
    require_finite(model, module)
    return pack(state_tensors(module))


def require_finite(model: Model, module: nn.Module) -> None:
    """Check that all weights are numbers.

    Raises:
        UserError: One is NaN or infinite.
    """
    for name, parameter in module.named_parameters():
        finite = torch.isfinite(parameter)
        if not bool(finite.all()):
            raise UserError(
                f"model.name: {model.name} has {int((~finite).sum()):,} values in {name} that are NaN or infinite: its "
                "training diverged, or its file is damaged. Use another checkpoint"
            )


def load_module(model: Model, config: Any, fine_tuned: bool, kind: str) -> nn.Module:
    """Load a checkpoint as a module in `model.dtype`. Reads safetensors only, never a pickle.

    Raises:
        UserError: The checkpoint cannot be loaded or does not fit the task.
    """
    try:
        with quiet():
            module, loading_info = auto_class(kind).from_pretrained(
                model.name,
                config=config,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                dtype=DTYPES[model.dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below with a message that names the shapes
            )
    except Exception as error:  # noqa: BLE001 - see above
        raise UserError(load_error_message(model, error)) from None
    for key, shape, needed in sorted(loading_info["mismatched_keys"]):  # a set: sorted for the same message every time
        cause = "Its head was made for other classes: start from the model without it"
        if kind == "causal-lm":
            cause = "Its config.json is another model's"
        raise UserError(
            f"model.name: {model.name} cannot be loaded: its {key} has shape {tuple(shape)}, this task needs "
            f"{tuple(needed)}. {cause}"
        )
    missing = set(loading_info["missing_keys"])
    body = f"{module.base_model_prefix}."
    body_keys = sorted(key for key in missing if key.startswith(body) and ".pooler." not in key)
    if body_keys:
        raise UserError(
            f"model.name: {model.name} has no weights for {body_keys[0]} and {len(body_keys) - 1} more of its body"
        )
    if fine_tuned and missing:
        raise UserError(
            f"model.name: {model.name} is taken as fine-tuned (eval, and dense.epochs: 0), but it lacks "
            f"{', '.join(sorted(missing))}"
        )
    if kind == "causal-lm" and is_bidirectional(module):
        raise UserError(
            f"model.name: {model.name} is no causal language model: it sees the tokens that it has to predict"
        )
    return module  # type: ignore[no-any-return]


@torch.no_grad()
def is_bidirectional(module: nn.Module) -> bool:
    """Whether a model's logits at a token depend on the next token, as an encoder's do."""
    ids = torch.tensor([[0, 0], [0, 1]])  # two rows with the same first token
    first, second = module.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()
    return bool((first - second).abs().max() > 0.02 * first.std())  # a smaller difference is rounding in bf16


def auto_class(kind: str) -> Any:
    """The auto class of transformers for a task.kind."""
    import transformers

    return getattr(transformers, TASK_LOSSES[kind].auto_class)


@contextmanager
def quiet() -> Iterator[None]:
    """Run a block without transformers' warnings and progress bars: raymask checks the loaded weights itself."""
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


def load_error_message(model: Model, error: BaseException) -> str:
    """Why a model cannot be loaded, and what to do, in one line."""
    if "custom code" in str(error):
        advice = "it brings code of its own, which runs only with model.trust_remote_code: true"
    elif Path(model.name).exists():
        advice = "the folder needs config.json, model.safetensors and a tokenizer"
    else:
        advice = "it is neither a folder here nor reachable on the hub: check the name, or the network"
    return f"model.name: {model.name} cannot be loaded: {advice} ({first_line(error)})"


def build_model(
    config: Any, trust_remote_code: bool = False, *, kind: str = "classification", show_attention: bool = False
) -> nn.Module:
    """Build a model with new weights, in the configuration's dtype.

    Args:
        config: The transformers configuration.
        trust_remote_code: Whether the model's own code may run.
        kind: The spec's task.kind.
        show_attention: Use the attention that can return its probabilities.
    """
    return auto_class(kind).from_config(  # type: ignore[no-any-return]
        config,
        trust_remote_code=trust_remote_code,
        attn_implementation="eager" if show_attention else None,
    )


def checkpoint_activations(module: Any, device: torch.device) -> None:
    """Turn on gradient checkpointing: only layer inputs are kept, and the backward pass recomputes the rest.

    The results do not change: recomputation has the same kernels and the same random state, so dropout is the same.

    Args:
        module: A transformers model.
        device: The device that it trains on.

    Raises:
        ValueError: The model does not support it.
    """
    kernels = cpu_kernels(module, device)
    options = {"use_reentrant": False, "preserve_rng_state": True, "context_fn": lambda: (nullcontext(), kernels())}
    # where transformers has the newer name, the older one warns
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable(options)


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a snapshot holds: parameters and saved buffers by name. They share the module's memory.

    A tied parameter occurs once.
    """
    saved = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}
