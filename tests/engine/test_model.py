"""PolicyModel gives the log-probs of the plain model, for every family, packed and padded."""

import pytest
import torch
from rows import make_rows

from plait.engine.batch import collate, from_sequences
from plait.engine.config import LearnerConfig
from plait.engine.model import PolicyModel, load_model, token_logprobs, token_statistics
from tiny_model import FAMILIES, make_tiny_model

SEQUENCES = [[5, 9, 200, 31, 7, 8, 9, 10, 11, 12, 13, 14], [44, 3], [17, 18, 19, 20, 21]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp(request.param), family=request.param)


def plain_logprobs(model, sequence):
    ids = torch.tensor([sequence])
    logits = model(ids).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0], logits


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_log_probs_and_entropy_agree_with_the_plain_model(family, packing):
    from transformers import AutoModelForCausalLM

    model = load_model(str(family), LearnerConfig(packing=packing))
    policy = PolicyModel(model, packing=packing, logit_chunk_tokens=4)
    batch = from_sequences(SEQUENCES)
    plain = AutoModelForCausalLM.from_pretrained(family, attn_implementation="eager").eval()
    with torch.no_grad():
        logprobs, entropy, _ = policy(batch, True)
        start = 0
        for sequence in SEQUENCES:
            expected, logits = plain_logprobs(plain, sequence)
            end = start + len(sequence)
            assert logprobs[start] == 0
            torch.testing.assert_close(
                logprobs[start + 1 : end].double(), expected, atol=1e-5, rtol=0
            )
            p = logits.softmax(-1)
            torch.testing.assert_close(
                entropy[start + 1 : end].double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=0
            )
            start = end


def test_the_head_is_checked_against_the_plain_model(family, monkeypatch):
    from plait.engine.errors import LearnerError

    model = load_model(str(family), LearnerConfig())
    policy = PolicyModel(model, packing=True, logit_chunk_tokens=8)
    policy.check_head()
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.9
        return output

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(LearnerError, match="not supported"):
        policy.check_head()


def test_only_trained_tokens_have_log_probs(tiny_model):
    model = load_model(str(tiny_model), LearnerConfig())
    batch = collate(make_rows("pe"))
    logprobs, entropy, _ = PolicyModel(model, packing=True, logit_chunk_tokens=64)(batch, False)
    assert entropy is None
    assert ((logprobs != 0) == batch.trained).all()


def test_statistics_are_those_of_log_softmax():
    logits = torch.randn(7, 11, dtype=torch.float64) * 3
    targets = torch.randint(0, 11, (7,))
    logprobs, entropy = token_statistics(logits, targets)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs, expected[torch.arange(7), targets])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    torch.testing.assert_close(token_logprobs(logits, targets), logprobs)
    assert token_logprobs(logits.bfloat16(), targets).dtype == torch.float32
