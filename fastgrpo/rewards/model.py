"""A reward model as a reward: a sequence classifier with one label, its score is the reward.

Inference only, on one device, with the model's own tokenizer. transformers is imported when one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.rewards.builtin import Completion


class RewardModel:
    """Scores prompt + completion with an `AutoModelForSequenceClassification` of one label.

    A chat goes through the reward model's own chat template, the completion as the last assistant message; strings are
    joined and tokenized as the tokenizer does by default. Scores are fp32 numbers as the model gives them, unscaled.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        batch_size: int = 8,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        """Load it, in eval mode, frozen.

        model:      a hub name, a local folder or a loaded model (then `tokenizer` must be given).
        batch_size: sequences per forward; those of a batch have similar lengths.
        max_length: longer token sequences lose their beginning; None = never cut.
        device:     where it runs; default: the current CUDA device at the first call, without CUDA the CPU.
        dtype:      of the weights; "auto" = as stored.

        Raises ValueError when the checkpoint holds no reward head (it would be random), has several labels, or there is
        no token to pad with.
        """
        if batch_size < 1:
            raise ValueError(f"reward model: batch_size must be at least 1, got {batch_size}")
        if isinstance(model, (str, Path)):
            self.__name__ = Path(model).name
            model, tokenizer = _load(str(model), tokenizer, dtype)
        else:
            self.__name__ = type(model).__name__
        if tokenizer is None:
            raise ValueError("reward model: a loaded model needs its tokenizer")
        if model.config.num_labels != 1:
            raise ValueError(f"reward model {self.__name__!r}: expected 1 label, got {model.config.num_labels}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self._device = device
        self._pad_id = _pad_token_id(model, tokenizer)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Completion], completions: Sequence[Completion], **columns: Any) -> list[float]:
        """A score per completion. Does not depend on `batch_size` beyond rounding."""
        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = self.model.to(device)
        sequences = [
            self._token_ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)
        ]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            input_ids, attention_mask = self._pad([sequences[i] for i in members], device)
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
            for i, score in zip(members, logits[:, 0].float().tolist(), strict=True):
                scores[i] = score
        return scores

    def _token_ids(self, prompt: Completion, completion: Completion) -> list[int]:
        if isinstance(prompt, str) and isinstance(completion, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        elif isinstance(prompt, list) and isinstance(completion, list):
            text = self.tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them
        else:
            raise TypeError("prompt and completion must both be strings or both be chats")
        if not ids:
            raise ValueError("reward model: an empty prompt and completion cannot be scored")
        return ids if self.max_length is None else ids[-self.max_length :]

    def _pad(self, sequences: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
        """[B, longest] int64 ids padded on the right, and their mask."""
        longest = max(map(len, sequences))
        ids = [sequence + [self._pad_id] * (longest - len(sequence)) for sequence in sequences]
        mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _load(name: str, tokenizer: Any, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=dtype, output_loading_info=True
        )
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
    except (OSError, RuntimeError) as error:  # not found; or a head of another size
        raise ValueError(f"reward model {name!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{name!r} is no reward model: its checkpoint lacks {missing}, which would be random")
    return model, tokenizer


def _pad_token_id(model: Any, tokenizer: Any) -> int:
    """The id to pad with, set on the model too: decoders score the last token that is not padding.

    The model's own comes first, because it was trained to pool by it.
    """
    config = model.config.get_text_config()
    for pad_id in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if pad_id is not None and pad_id >= 0:
            config.pad_token_id = model.config.pad_token_id = pad_id
            return pad_id
    raise ValueError("reward model: neither the model nor its tokenizer names a padding or end-of-sequence token")
