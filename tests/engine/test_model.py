"""PolicyModel gives the log-probs of the plain model, for every family, packed and padded."""

import pytest
import torch
from rows import make_rows

from plait.engine.attention import SHORT_TOKENS, attend_short, is_short
from plait.engine.batch import collate, from_sequences
from plait.engine.config import LearnerConfig
from plait.engine.model import (
    PolicyModel,
    full_kl,
    load_model,
    token_logprobs,
    token_statistics,
    topk_entropy,
)
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
        logprobs, entropy, *_ = policy(batch, frozenset({"entropy"}))
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
    logprobs, entropy, *_ = PolicyModel(model, packing=True, logit_chunk_tokens=64)(batch)
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


def test_distances_to_the_reference_come_in_chunks_with_a_gradient_to_the_policy_only(tiny_model):
    model, frozen = (load_model(str(tiny_model), LearnerConfig()) for _ in range(2))
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.mul_(1.3)
    layout = {"packing": True, "logit_chunk_tokens": 3}
    reference = PolicyModel(frozen.requires_grad_(False), **layout)
    policy = PolicyModel(model, reference=reference, entropy_top_k=5, **layout)
    assert not [name for name, _ in policy.named_parameters() if "reference" in name]
    batch = from_sequences(SEQUENCES)
    out = policy(batch, frozenset({"ref_kl", "topk_entropy"}))
    assert out.entropy is None
    (out.forward_kl.sum() + 2 * out.reverse_kl.sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    total = torch.zeros(())
    for row, sequence in enumerate(SEQUENCES):
        ids, rows = torch.tensor([sequence]), {"row_lengths": [len(sequence)]}
        logits = model(ids, **rows).logits[0, :-1]
        ref_logits = frozen(ids, **rows).logits[0, :-1]
        forward, reverse = full_kl(logits, ref_logits)
        p, q = logits.double().softmax(-1), ref_logits.double().softmax(-1)
        torch.testing.assert_close(forward.double(), (q * (q / p).log()).sum(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(reverse.double(), (p * (p / q).log()).sum(-1), atol=1e-5, rtol=0)
        start, end = batch.row_starts[row : row + 2].tolist()
        torch.testing.assert_close(out.forward_kl[start + 1 : end], forward, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.reverse_kl[start + 1 : end], reverse, atol=1e-5, rtol=0)
        largest = topk_entropy(logits, 5)
        torch.testing.assert_close(out.topk_entropy[start + 1 : end], largest, atol=1e-5, rtol=0)
        total = total + forward.sum() + 2 * reverse.sum()
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("length", "total"), [(64, 64), (7, 7), (20, 33), (1, 9)])
def test_short_rows_attend_as_the_kernel_does(length, total):
    """Values and gradients, grouped heads, the last tokens of a row."""
    torch.manual_seed(0)
    heads, width = {"query": 6, "key": 2, "value": 2}, 8
    query, key, value = tensors = [
        torch.randn(1, n, length if name == "query" else total, width, requires_grad=True)
        for name, n in heads.items()
    ]
    visible = torch.ones(length, total, dtype=torch.bool).tril(total - length)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, enable_gqa=True
    )
    found = attend_short(query, key, value, None)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    pull = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, tensors, pull)
    for one, other in zip(gradients, torch.autograd.grad(expected, tensors, pull), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_half_precision_on_the_cpu_takes_short_rows_by_products():
    def key(tokens, dtype):
        return torch.zeros(1, 2, tokens, 8, dtype=dtype)

    assert is_short(key(SHORT_TOKENS, torch.bfloat16))
    assert not is_short(key(SHORT_TOKENS + 1, torch.bfloat16))
    assert not is_short(key(8, torch.float32))


@pytest.mark.parametrize("tokens", [40, SHORT_TOKENS + 40])
def test_bfloat16_agrees_with_float32_at_any_length(tiny_model, tokens):
    """Above and below the length where the kernel takes over, the error is that of the precision."""
    generator = torch.Generator().manual_seed(0)
    batch = from_sequences([torch.randint(3, 300, (tokens,), generator=generator).tolist()])
    found = []
    for dtype in ("float32", "bfloat16"):
        model = load_model(str(tiny_model), LearnerConfig(dtype=dtype, zero_stage=1))
        with torch.no_grad():
            found.append(PolicyModel(model, packing=True, logit_chunk_tokens=64)(batch).logprobs)
    assert (found[0] - found[1]).abs().mean() < 0.03
