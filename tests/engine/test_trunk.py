"""What of a model is stepped, trained and read by heads: the part that reads text, under whatever name it stands."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny_models import BOS, EOS, PAD, VOCABULARY, tiny_model, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from textgym.engine.trunk import trunk_of
from textgym.language_model import LanguageModel
from textgym.reward_training.backbone import open_backbone
from textgym.reward_training.scorer import TextScorer
from textgym.rewards import ClassifierReward
from textgym.rewards.models.headed_model import HeadedRewardModel

SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
LLAMA4 = {
    **SHAPE,
    **IDS,
    "intermediate_size_mlp": 32,
    "num_local_experts": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "attention_chunk_size": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def llama4() -> PreTrainedModel:
    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(**LLAMA4)).eval()


def llama4_with_pictures() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = {**SHAPE, "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32}
    vision |= {"projector_output_dim": 32, "pixel_shuffle_ratio": 0.5}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=LLAMA4, vision_config=vision)).eval()


def test_the_trunk_is_what_reads_text():
    model = llama4()
    assert trunk_of(model) is model.model
    assert trunk_of(model.model) is model.model
    seeing = llama4_with_pictures()
    assert trunk_of(seeing) is seeing.language_model.model
    llama = tiny_model("llama")
    assert trunk_of(llama) is llama.model
    classifier = BertForSequenceClassification(BertConfig(**SHAPE, vocab_size=8))
    assert trunk_of(classifier) is classifier.bert
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert trunk_of(t5) is t5  # both its halves


@pytest.mark.parametrize("make", [llama4, llama4_with_pictures])
def test_a_model_with_its_trunk_under_another_name_has_its_own_log_probs(make):
    model = make()
    lm = LanguageModel(model, tiny_tokenizer())
    ids = torch.tensor([[5, 9, PAD, 7, 30]])
    got = lm.head(lm.cached(16).last_hidden(ids, torch.tensor([5])))[0]
    torch.testing.assert_close(got, model(input_ids=ids, use_cache=False).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_a_new_head_is_put_on_the_trunk_and_only_the_trunk_is_frozen():
    model = llama4()
    headed, tokenizer = open_backbone(model, tiny_tokenizer(), 1, seed=0, head="mlp", head_size=8)
    assert headed.backbone is model.model
    scorer = TextScorer(headed, tokenizer, frozen=True)
    assert scorer.causal
    scorer.train()
    assert headed.score.training
    assert not headed.backbone.training
    headed.eval()
    ids = [5, 9, 7]
    state = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(scorer.at_end([ids])[0], headed.score(state), atol=1e-5, rtol=1e-4)


def test_a_head_over_all_layers_is_pickled_after_it_has_read_and_reads_the_same_again():
    model = HeadedRewardModel.around(tiny_model("llama").base_model, "mlp", 1, causal=True, layers="all").eval()
    reward = ClassifierReward(model, tiny_tokenizer())
    texts = {"prompts": ["the film", "i"], "completions": ["was good", "love it ."]}
    before = reward(**texts)
    again = pickle.loads(pickle.dumps(reward))
    assert again(**texts) == pytest.approx(before, abs=1e-6)
    assert reward(**texts) == before
    assert pickle.loads(pickle.dumps(again))(**texts) == pytest.approx(before, abs=1e-6)
