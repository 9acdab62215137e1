"""What the compiler makes of the kernels, at the seven models' sizes, on a machine without a GPU: nothing
spilled, shared memory in bounds, 128-bit loads and stores in the row kernels, tensor cores in products."""

import pytest

pytest.importorskip("triton")
from aot import OPS, compiled, table  # noqa: E402

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}                # bytes a block may have
PRODUCTS = ("_scores", "_outer", "_scan", "_scan_backward", "_scores_backward", "_group_backward")
NUMBERS = ("_token_logprobs ", "_cross_entropy gradient=False ")       # write few numbers


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 80, 100])
@pytest.mark.parametrize("op", OPS)
def test_compiles_to(op, arch):
    found = compiled(arch, OPS[op])
    print(table(found))
    assert found
    for k in found:
        assert k.stack == 0 and k.count("LDL|STL") == 0, k
        assert k.registers <= 255 and k.registers * 32 * k.warps <= 65536, k
        assert k.shared <= SHARED[arch], k
        if k.name in PRODUCTS:
            if "bf16" in k.dtypes:                                     # fp32 is exact: no tensor cores
                assert k.count("HGMMA|UTC[HQ]*MMA" if arch >= 90 else "HMMA") > 0, k
                assert arch != 90 or k.count("HMMA") == 0, k
        else:
            assert k.count(r"(LDG|LDGSTS)\S*\.128|UTMALDG"), k
            assert k.count(r"STG\S*\.128|UTMASTG") or f"{k.name} {k.sizes} ".startswith(NUMBERS), k
            # what is narrower is a row's few numbers, or the taps of one decoded token
            assert k.count(r"(LDG|STG)\S*\.[US](8|16)$") <= 1 or k.name == "_step", k
            assert k.count(r"(LDG|STG)\.E$") <= max(8, k.count(r"(LDG|STG)\S*\.128")), k
