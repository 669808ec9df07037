"""From a name, a folder, a factory or a loaded model to a `Policy` on its device."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.importing import import_object
from fastgrpo.policy.attention import register
from fastgrpo.policy.compilation import compile_layers
from fastgrpo.policy.fusion import fuse_layers
from fastgrpo.policy.policy import Policy
from fastgrpo.policy.storage import own_memory
from fastgrpo.policy.work import decoder_of

logger = logging.getLogger(__name__)


def load_policy(model: Any, processing_class: Any, config: GRPOConfig, peft_config: Any = None) -> Policy:
    """Load, place and check the policy.

    model: hub name, local folder, "module:function" factory, or a loaded `PreTrainedModel`.
    processing_class: the tokenizer, or where to find it; None = the model's own.
    peft_config: a PEFT config; default: LoRA from the options when `use_peft`.
    Raises ValueError, in one line, for what is not a model, a tokenizer of another vocabulary, or a model that cannot
    be packed.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # it would write into ours, at every checkpoint
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, own_tokenizer = _resolve_factory(model, config.seed)
    source = model
    if isinstance(model, str):
        model = _from_pretrained(model, config, dtype)
    if not hasattr(model, "get_decoder"):
        raise ValueError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    tokenizer = _load_tokenizer(processing_class or own_tokenizer or source, model, config)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} tokens, the model's embedding "
            f"{model.get_input_embeddings().weight.shape[0]} rows"
        )
    model = _as_loaded(model).to(device)
    _cast(model, dtype)
    model.set_attn_implementation(register())
    _drop_nothing(model)
    own_memory(model)
    if config.gradient_checkpointing:
        _checkpoint(model, config.gradient_checkpointing_every)
    if peft_config is not None or config.use_peft:
        model = _with_adapters(model, peft_config, config)
    policy = Policy(model.eval(), tokenizer)
    if config.torch_compile:
        compile_layers(policy.causal_lm)
    elif config.fused_layers or (config.fused_layers is None and device.type == "cuda"):
        reason = fuse_layers(policy.model)
        if reason is not None and config.fused_layers:
            raise ValueError(f"fused_layers=true: {type(policy.causal_lm).__name__} has others: {reason}")
        if reason is not None:
            logger.warning("updates are slower than they could be: layers run as transformers has them: %s", reason)
    policy.self_check(share_prompts=config.share_prompts, longest=_longest(config))
    return policy


def load_skeleton(model: Any, config: GRPOConfig) -> Any:
    """The causal model with its weights on the meta device: of a hub name or a folder only the config is read.

    model: as of `load_policy`. A factory is called, since nothing else knows what it makes; a loaded model is returned.
    Raises ValueError, in one line, for what is not a model.
    """
    model, _ = _resolve_factory(model, config.seed)
    if isinstance(model, str):
        from transformers import AutoConfig

        options = {"trust_remote_code": config.trust_remote_code, "revision": config.model_revision or "main"}
        while (base := _base_of(model)) is not None:
            model = base
        _check_folder(model)
        try:
            model = skeleton_of(AutoConfig.from_pretrained(model, **options))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model={model!r} cannot be loaded: {_first_line(error)}") from error
    if not hasattr(model, "get_decoder"):
        raise ValueError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    return model


def skeleton_of(model_config: Any) -> Any:
    """The causal model of a transformers config on the meta device; a mapping names its "model_type"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(model_config, dict):
        model_config = AutoConfig.for_model(**model_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def _as_loaded(model: Any) -> Any:
    """With layers as transformers has them, which another run may have compiled or fused."""
    for module in model.modules():
        if hasattr(module, "_eager_class"):
            module.__class__ = module._eager_class
            vars(module).pop("_fused", None)
    return model


def _drop_nothing(model: Any) -> None:
    """No dropout: samples know none, so in the update it would make every ratio noise. Adapters have their own."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters alone: the buffers that rotations are computed from would lose their angles in 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _checkpoint(model: Any, every: int) -> None:
    """Recompute layers 0, `every`, 2 * `every`, ... in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Renamed in the course of transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    layers = [m for m in decoder_of(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    if every > 1 and not layers:
        raise ValueError(
            f"gradient_checkpointing_every={every}: {type(model).__name__} checkpoints all its layers or none"
        )
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % every == 0


def _longest(config: GRPOConfig) -> int | None:
    """Tokens of the longest sequence that can be trained on; None = what the model's context allows."""
    return None if config.max_prompt_length is None else config.max_prompt_length + config.max_completion_length


def pick_device(name: str) -> torch.device:
    """ "auto" takes a GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda devices are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {_first_line(error)}") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _resolve_factory(model: Any, seed: int) -> tuple[Any, Any]:
    """What a factory made, as (model or where it is, tokenizer or None)."""
    if isinstance(model, str) and is_factory(model):
        model = _call_factory(model, seed)
    if isinstance(model, tuple):
        if len(model) != 2:
            raise ValueError(
                f"a model factory returns a model, a folder or (model, tokenizer), not {len(model)} things"
            )
        return model
    return (str(model) if isinstance(model, Path) else model), None


def is_factory(source: str) -> bool:
    """Is it "module:function", not a hub name or folder?"""
    return ":" in source and not Path(source).exists()


def _call_factory(path: str, seed: int) -> Any:
    factory = import_object(path)
    try:
        signature = inspect.signature(factory)
        arguments = {"seed": seed} if "seed" in signature.parameters else {}
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{path!r} must be a function without arguments, or with `seed`: {error}") from error
    return factory(**arguments)


def _from_pretrained(source: str, config: GRPOConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    if (base := _base_of(source)) is not None:
        return _with_merged(_from_pretrained(base, config, dtype), source)
    _check_folder(source)
    try:
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=config.trust_remote_code, revision=config.model_revision or "main"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model={source!r} cannot be loaded: {_first_line(error)}") from error


def _check_folder(source: str) -> None:
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        near = [folder / "model", *sorted(folder.glob("checkpoints/step-*/model"), reverse=True)]
        hint = next((f"; did you mean {str(path)!r}?" for path in near if path.is_dir()), "")
        raise ValueError(f"model={source!r} is a folder without a config.json: not a model{hint}")
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"model={source!r}: no such folder")


def _base_of(source: str) -> str | None:
    """Of a folder that holds adapters in place of a model, such as a LoRA run's checkpoints: their base model."""
    description = Path(source).expanduser() / "adapter_config.json"
    if not description.is_file() or (description.parent / "config.json").is_file():
        return None
    try:
        base = json.loads(description.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model={source!r} cannot be loaded: {description.name}: {_first_line(error)}") from error
    if not base:
        raise ValueError(f"model={source!r} holds adapters that do not name their base model: it was made in memory")
    return str(base)


def _with_merged(model: Any, adapters: str) -> Any:
    """The model with the adapters of a folder in its weights; they, and what is trained on top, are one model."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("use_peft needs the extra: pip install 'fastgrpo[peft]'") from error
    try:
        merged = PeftModel.from_pretrained(model, adapters).merge_and_unload().requires_grad_(True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"model={adapters!r} cannot be loaded: {_first_line(error)}") from error
    merged.name_or_path = merged.config.name_or_path = adapters  # new adapters must not take the bare model for theirs
    return merged


def _load_tokenizer(source: Any, model: Any, config: GRPOConfig) -> Any:
    if isinstance(source, str) and is_factory(source):
        source = _call_factory(source, config.seed)
    if hasattr(source, "get_decoder"):
        source = model.config.name_or_path
    if not isinstance(source, str):
        return source
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, revision=config.model_revision or "main"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer in {source!r} ({_first_line(error)}); give processing_class") from error
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        # transformers makes an empty one up when the folder has the model's config but no tokenizer files.
        raise ValueError(f"no tokenizer in {source!r}; give processing_class")
    return tokenizer


def _with_adapters(model: Any, peft_config: Any, config: GRPOConfig) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("use_peft needs the extra: pip install 'fastgrpo[peft]'") from error
    if peft_config is None:
        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(f"peft_config: {type(peft_config).__name__} learns a prompt, and rollouts know only weights")
    # Adapters start from random numbers of the global generator: the same for a seed, whatever was drawn before.
    torch.manual_seed(config.seed)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, copy.copy(peft_config))  # it writes into its argument


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
