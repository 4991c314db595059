"""The fused LM head: values and gradients of the full logits, in every precision, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from rows import make_rows

from plait.engine.batch import collate
from plait.engine.config import LearnerConfig, LoraConfig
from plait.engine.head_statistics import has_plain_head, head_statistics
from plait.engine.model import PolicyModel, load_model, token_statistics
from tiny_model import make_tiny_model

TOKENS, HIDDEN, VOCABULARY = 11, 5, 37


def make_inputs(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,))


def full(hidden, weight, tokens, softcap):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return token_statistics(logits, tokens)


@pytest.mark.parametrize("chunk_tokens", [3, 11, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("cached", [1, 2 * VOCABULARY, 1 << 20])
def test_values_and_gradients_are_those_of_the_full_logits(
    entropy, softcap, chunk_tokens, cached, monkeypatch
):
    monkeypatch.setattr("plait.engine.head_statistics.CACHED_LOGITS", cached)
    hidden, weight, tokens = make_inputs(torch.float64)
    pull = torch.randn(2, TOKENS, dtype=torch.float64)
    logprobs, entropies = head_statistics(
        hidden, weight, tokens, softcap=softcap, chunk_tokens=chunk_tokens, entropy=entropy
    )
    expected, expected_entropies = full(hidden, weight, tokens, softcap)
    torch.testing.assert_close(logprobs, expected)
    loss, expected_loss = (logprobs * pull[0]).sum(), (expected * pull[0]).sum()
    if entropy:
        torch.testing.assert_close(entropies, expected_entropies)
        assert entropies is not None
        loss = loss + (entropies * pull[1]).sum()
        expected_loss = expected_loss + (expected_entropies * pull[1]).sum()
    else:
        assert entropies is None
    found = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip(found, torch.autograd.grad(expected_loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_sums_over_chunks_in_float32():
    """The gradient of the weights is no worse with 1 token a chunk than with all in one."""
    hidden, weight, tokens = make_inputs(torch.bfloat16)

    def gradient(chunk_tokens, hidden, weight):
        logprobs, _ = head_statistics(
            hidden, weight, tokens, softcap=None, chunk_tokens=chunk_tokens, entropy=False
        )
        assert logprobs.dtype == torch.float32
        return torch.autograd.grad(logprobs.sum(), weight)[0].float()

    exact = gradient(TOKENS, hidden.float(), weight.float())
    errors = [(gradient(n, hidden, weight) - exact).norm() for n in (1, TOKENS)]
    assert errors[0] < 1.1 * errors[1]


def test_a_frozen_head_or_body_gets_no_gradient():
    hidden, weight, tokens = make_inputs(torch.float32)
    for inputs, trained in (
        ((hidden, weight.detach()), hidden),
        ((hidden.detach(), weight), weight),
    ):
        logprobs, _ = head_statistics(*inputs, tokens, softcap=None, chunk_tokens=4, entropy=False)
        (gradient,) = torch.autograd.grad(logprobs.sum(), trained)
        assert gradient.any()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_model_gives_what_recorded_chunks_give(family, tmp_path, monkeypatch):
    """Log-probs, entropy and all gradients to 1e-6; Gemma 2 caps its logits."""
    path = make_tiny_model(tmp_path, family=family)
    batch = collate(make_rows("ppephe"))
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("plait.engine.model.has_plain_head", lambda model: False)
        model = load_model(str(path), LearnerConfig())
        out = PolicyModel(model, packing=True, logit_chunk_tokens=16)(batch, frozenset({"entropy"}))
        assert out.entropy is not None
        (out.logprobs.mean() + 0.1 * out.entropy.mean()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append((out.logprobs.detach(), out.entropy.detach(), grads))
    torch.testing.assert_close(found[0][:2], found[1][:2], atol=1e-6, rtol=1e-6)
    for name, gradient in found[1][2].items():
        torch.testing.assert_close(found[0][2][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_head_with_adapters_is_not_one_matrix(tiny_model):
    assert has_plain_head(load_model(str(tiny_model), LearnerConfig()))
    lora = LoraConfig(type="lora", targets=["lm_head"])
    model = load_model(str(tiny_model), LearnerConfig(parameter_selection=lora))
    assert not has_plain_head(model)


def test_logits_of_a_micro_batch_never_exist_at_once(monkeypatch):
    """Neither forward nor backward asks for more than a chunk of them."""
    sizes = []
    module = "plait.engine.head_statistics"
    from plait.engine import head_statistics as file

    chunk_logits = file.chunk_logits

    def watched(hidden, weight):
        sizes.append(len(hidden))
        return chunk_logits(hidden, weight)

    monkeypatch.setattr(f"{module}.chunk_logits", watched)
    hidden, weight, tokens = make_inputs(torch.float32)
    logprobs, _ = head_statistics(
        hidden, weight, tokens, softcap=None, chunk_tokens=4, entropy=False
    )
    logprobs.sum().backward()
    assert sizes == [4, 4, 3] * 2
