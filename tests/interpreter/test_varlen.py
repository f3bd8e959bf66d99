"""ragged_attention by PyTorch's varlen_attn, which no CPU computes: its ops are what a stand-in returns, by the installed torch's own signatures."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from cases.attention import assert_within_the_rule, case_of, make_case
from standin.rivals import OnCPU

import step_kernels as sk
from step_kernels import attention_provider
from step_kernels.triton.attention.launch import row_key
from step_kernels.triton.common import tuned

LENGTHS = (0, 1, 17, 65)
FORWARD, BACKWARD = "torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"


@pytest.fixture
def varlen(kernels) -> Iterator[OnCPU]:
    with OnCPU() as mode:
        yield mode


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_named_for_all_calls(dtype, varlen, kernels, monkeypatch):
    monkeypatch.setattr(attention_provider, "named", "varlen")
    case = make_case(LENGTHS, 2, 16, dtype, spare=150)
    assert_within_the_rule(case, case.run(scheduled=True, max_seqlen=70))
    assert kernels == ["attention_schedule_kernel"] and varlen.seen == [(FORWARD, 70), (BACKWARD, 70)]
    live = case.run(scheduled=True, tail="undefined")[0][: case.live]
    assert torch.equal(live, case.run(scheduled=True)[0][: case.live])
    assert math.isnan(case.run(scheduled=True, tail="undefined")[0][case.live :].sum())


@pytest.mark.parametrize("kernel", ("attention_forward", "attention_backward"))
def test_measured_to_be_faster(kernel, varlen, kernels, monkeypatch):
    """Either pass alone: the log-sum-exp of one serves the other. Where it cannot run, the committed rows do."""
    case = make_case(LENGTHS, 2, 16, torch.float16)
    key = " ".join(map(str, row_key(kernel, case.qkv[0], case.cu_seqlens)))
    with tuned.forced(key, tuned.VARLEN):
        assert_within_the_rule(case, case.run())
        assert [name for name, _ in varlen.seen] == [FORWARD if "forward" in key else BACKWARD]
        assert len(kernels) == (3 if "forward" in key else 1)
        biased = make_case(LENGTHS, 2, 16, torch.float16, biased=True)
        assert_within_the_rule(biased, biased.run())
        monkeypatch.setattr(attention_provider, "named", "triton")
        case.run()
    assert len(varlen.seen) == 1


def test_images_without_tokens_and_batches_without_images(varlen, kernels, monkeypatch):
    monkeypatch.setattr(attention_provider, "named", "varlen")
    for lengths in ((), (0, 0)):
        case = make_case(lengths, 2, 16, torch.float16)
        assert_within_the_rule(case, case.run(scheduled=True))


def test_what_it_cannot_compute_is_refused_by_name(kernels, monkeypatch):
    case = make_case(LENGTHS, 2, 16, torch.float16)
    case.run()
    monkeypatch.setattr(attention_provider, "named", "varlen")
    odd = case_of(LENGTHS, [torch.randn(86, 2, 17).half()[:, :, 1:] for _ in range(4)])
    for wrong, reason in (
        (make_case(LENGTHS, 2, 16, torch.float32), "float16 and bfloat16, q is torch.float32"),
        (make_case(LENGTHS, 2, 20, torch.float16), "multiples of 8, q has 20"),
        (make_case(LENGTHS, 2, 16, torch.float16, biased=True), "no key_bias"),
        (make_case(LENGTHS, 2, 16, torch.float16, scale=-0.1), "scales above 0, got -0.1"),
        (odd, "16 bytes at a time"),
    ):
        with pytest.raises(ValueError, match=f"STEP_KERNELS_ATTENTION is varlen, but varlen_attn .*{reason}"):
            wrong.run()
    monkeypatch.setenv("STEP_KERNELS_ATTENTION", "flash")
    with pytest.raises(ValueError, match="STEP_KERNELS_ATTENTION: expected one of triton, varlen, got 'flash'"):
        attention_provider._named()
    with sk.use_backend("reference"):  # has no kernels to choose from
        make_case(LENGTHS, 2, 16, torch.float32).run()
