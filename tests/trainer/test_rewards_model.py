"""A tiny random reward model on disk, against its own unbatched, unpadded forward."""

from __future__ import annotations

import pytest
import torch

from fastgrpo.rewards import resolve
from fastgrpo.rewards.model import RewardModel

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
PROMPTS = ["2 + 2 = ", "a", "what is seven times six", "x", "1 + 1 = "]
COMPLETIONS = ["4", "bcdef", "it is forty two and that is that", "", "3"]


def make_tokenizer(pad="<pad>", eos="<end>"):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<bos>"]
    vocab = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=eos, pad_token=pad)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(family, num_labels=1, **config):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=98,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_labels=num_labels,
        max_position_embeddings=256,
        **config,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "tiny-reward"
    make_model(request.param, pad_token_id=0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def alone(model, ids):
    """The score without batch and padding, read at the last token by hand."""
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return model.score(hidden).item()


def test_scores_do_not_depend_on_the_batch(checkpoint):
    reward = RewardModel(str(checkpoint), batch_size=2)
    ids = [reward.tokenizer(p + c)["input_ids"] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert all(i[0] == 2 for i in ids)
    expected = [alone(reward.model, i) for i in ids]
    assert len({round(e, 4) for e in expected}) == len(expected)
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, answer=[1] * 5) == pytest.approx(expected, abs=1e-6)
    assert RewardModel(str(checkpoint), batch_size=8)(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


def test_chats_go_through_the_template(checkpoint):
    reward = RewardModel(str(checkpoint))
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    completions = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    texts = [f"<user>{p}<end><assistant>{c}<end>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    ids = [reward.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert all(i[0] != 2 and i[-1] == 1 for i in ids)
    assert reward(prompts, completions) == pytest.approx([alone(reward.model, i) for i in ids], abs=1e-6)
    with pytest.raises(TypeError, match="both"):
        reward(prompts, COMPLETIONS)


def test_max_length_cuts_the_beginning(checkpoint):
    reward = RewardModel(str(checkpoint), max_length=3)
    ids = [reward.tokenizer(p + c)["input_ids"][-3:] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx([alone(reward.model, i) for i in ids], abs=1e-6)


def test_inference_only(checkpoint):
    model = make_model("llama", pad_token_id=0).train()
    reward = RewardModel(model, tokenizer=make_tokenizer())
    reward(PROMPTS, COMPLETIONS)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_pads_with_what_there_is():
    """No padding token anywhere: the end-of-sequence token serves; none of that either: refused."""
    model = make_model("llama")
    model.config.pad_token_id = None
    reward = RewardModel(model, tokenizer=make_tokenizer(pad=None), batch_size=5)
    ids = [reward.tokenizer(p + c)["input_ids"] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert model.config.pad_token_id == 1
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx([alone(model, i) for i in ids], abs=1e-6)

    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="neither the model nor its tokenizer"):
        RewardModel(model, tokenizer=make_tokenizer(pad=None, eos=None))


def test_a_model_without_a_reward_head_is_refused(tmp_path):
    from transformers import LlamaForCausalLM

    config = make_model("llama").config
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no reward model: its checkpoint lacks score\.weight"):
        RewardModel(str(tmp_path))


def test_several_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected 1 label, got 2"):
        RewardModel(make_model("llama", num_labels=2), tokenizer=make_tokenizer())
    make_model("llama", num_labels=2).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        RewardModel(str(tmp_path))


def test_resolved_by_folder(checkpoint):
    reward = resolve({"name": str(checkpoint), "batch_size": 3, "weight": 0.5})
    assert (reward.name, reward.weight, reward.fn.batch_size) == ("tiny-reward", 0.5, 3)
    with pytest.raises(ValueError, match=r"reward_funcs\[0\]: .* no option 'batchsize'; did you mean 'batch_size'\?"):
        resolve({"name": str(checkpoint), "batchsize": 3})


def test_a_missing_hub_name_fails_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'surely-nobody/no-such-model' cannot be loaded") as caught:
        resolve("surely-nobody/no-such-model")
    assert "\n" not in str(caught.value)
