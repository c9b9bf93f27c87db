"""What the kernels compile to for sm_80 and sm_90, read from the machine code; no GPU is needed.

A whole tile is read and written 128 bits at a time (64 where elements have 16 bits), from registers alone. Controls
that take away what makes this so show that the asserts can fail.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets kernels", allow_module_level=True)

import triton
import triton.language as tl
from progtuning_kernels.finalize import finalize_kernel
from progtuning_kernels.masked_adamw import masked_adamw_kernel, update_block
from progtuning_kernels.masked_adamw_8bit import masked_adamw_8bit_kernel
from progtuning_kernels.masked_norm import add_partials_kernel, sum_squares_kernel
from progtuning_kernels.worklist import Launch

from tests.kernels.sass import Binary, compile_kernel

ARCHITECTURES = (80, 90)
LAUNCH = Launch()
GROUPS_OF_FOUR = LAUNCH.block // (4 * 32 * LAUNCH.warps)
"""How many groups of four neighbours a thread holds."""

WORK = {"tiles": "*i32", "tile_counts": "*i32", "pieces": "*i64", "addresses": "*i64"}
UPDATE = WORK | {"skip": "*i32", "grad_scale_at": "*fp32", "scalars": "*fp32", "noise_key": "*i64"}
SIZES = {"TILE": LAUNCH.tile, "BLOCK": LAUNCH.block}

VARIANTS = {
    # name: constants, tensors of 32 bits read and written, tensors of 16 bits read and written
    "bf16": ({"GRADIENT": tl.bfloat16, "WEIGHT": "bf16", "PRECISION": "master"}, (3, 3), (1, 1)),
    "fp16": ({"GRADIENT": tl.float16, "WEIGHT": "fp16", "PRECISION": "master"}, (3, 3), (1, 1)),
    "fp32-gradient": ({"GRADIENT": tl.float32, "WEIGHT": "bf16", "PRECISION": "master"}, (4, 3), (0, 1)),
    "remainder": ({"GRADIENT": tl.bfloat16, "WEIGHT": "bf16", "PRECISION": "remainder"}, (2, 2), (3, 2)),
    "stochastic": ({"GRADIENT": tl.bfloat16, "WEIGHT": "bf16", "PRECISION": "stochastic"}, (2, 2), (2, 1)),
}


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def update_kernel(name: str, arch: int, *, whole: bool = True, **options: object) -> Binary:
    constants = VARIANTS[name][0] | SIZES | {"WHOLE": whole}
    return compile_kernel(masked_adamw_kernel, UPDATE, constants, arch, LAUNCH.warps, **options)


def require_registers_only(binary: Binary, registers: int) -> None:
    assert binary.registers <= registers
    assert binary.stack == binary.local == 0
    assert binary.count(r"\b(LDL|STL)") == 0


def require_no_conversion(binary: Binary) -> None:
    assert "convert_layout" not in binary.ttgir
    assert binary.count(r"\b(LDS|STS|BAR)\b") == 0


def require_wide(binary: Binary, words: tuple[int, int], halves: tuple[int, int]) -> None:
    assert binary.count(r"\bLDG\S*\.128") == words[0] * GROUPS_OF_FOUR
    assert binary.count(r"\bSTG\S*\.128") == words[1] * GROUPS_OF_FOUR
    assert binary.count(r"\bSTG\S*\.64") == halves[1] * GROUPS_OF_FOUR
    assert binary.count(r"\bLDG\S*\.64") >= halves[0] * GROUPS_OF_FOUR  # and entries of the work list
    assert binary.count(r"\b(LDG|STG)\S*\.U16") == 0


def require_unfused(binary: Binary) -> None:
    assert binary.ptx.count("div.rn.f32") > 0
    assert binary.ptx.count("sqrt.rn.f32") > 0
    assert not any(word in binary.ptx for word in ("fma.rn.f32", ".approx", ".full", ".ftz"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_whole_tiles_are_updated_with_wide_accesses_from_registers(name, arch):
    binary = update_kernel(name, arch)
    require_registers_only(binary, 72)
    require_no_conversion(binary)
    require_wide(binary, *VARIANTS[name][1:])
    require_unfused(binary)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["bf16", "remainder"])
def test_other_tiles_are_updated_element_by_element_from_registers(name, arch):
    binary = update_kernel(name, arch, whole=False)
    require_registers_only(binary, 88)
    require_no_conversion(binary)
    require_unfused(binary)
    assert binary.count(r"\b(LDG|STG)\S*\.128") == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("gradient", "wide"), [(tl.bfloat16, 4), (tl.float32, 8)], ids=["bf16", "fp32"])
def test_the_norm_reads_wide(gradient, wide, arch):
    signature = WORK | {"partials": "*fp64"}
    constants = SIZES | {"GRADIENT": gradient}
    binary = compile_kernel(sum_squares_kernel, signature, constants, arch, LAUNCH.warps, enable_fp_fusion=True)
    require_registers_only(binary, 64)
    assert binary.count(r"\bLDG\S*\.128") == wide
    assert binary.count(r"\bDFMA\b") > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_eight_bit_state_is_updated_without_spills(arch):
    signature = UPDATE | {"signed_map": "*fp32", "unsigned_map": "*fp32"}
    constants = VARIANTS["bf16"][0] | SIZES | {"WHOLE": True}
    binary = compile_kernel(masked_adamw_8bit_kernel, signature, constants, arch, LAUNCH.warps)
    require_registers_only(binary, 128)
    assert binary.count(r"\bLDG\S*\.128") == binary.count(r"\bSTG\S*\.128") == GROUPS_OF_FOUR


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_small_kernels_compile_without_spills(arch):
    names = finalize_kernel.arg_names
    kinds = {"hyper": "*fp64", "limits": "*fp64", "sum_of_squares": "*fp64", "norm": "*fp64", "active": "*i32"}
    kinds |= {"steps": "*i64", "skip": "*i32", "skipped": "*i64", "grad_scale": "*fp32", "scalars": "*fp32"}
    kinds |= {"updates": "*i64", "noise_key": "*i64", "seed": "i64", "num_groups": "i32"}
    assert set(kinds) == set(names) - {"GROUPS"}
    require_registers_only(compile_kernel(finalize_kernel, kinds, {"GROUPS": 32}, arch, 1), 128)
    signature = {"partials": "*fp64", "out": "*fp64"}
    require_registers_only(compile_kernel(add_partials_kernel, signature, {"PROGRAMS": 1024}, arch), 64)


# ---- controls: without what it takes, the asserts above fail -------------------------------------------------------


@triton.jit
def one_block(
    kept, weight, exp_avg, exp_avg_sq, gradient, grad_scale, scalar,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, WIDE16: tl.constexpr,
):  # fmt: skip
    """One block at addresses that are multiples of ``WIDE`` and, of 16-bit tensors, ``WIDE16`` bytes."""
    hyper = (scalar, scalar, scalar, scalar, scalar, scalar, scalar)
    update_block(
        kept, weight, exp_avg, exp_avg_sq, gradient, 0, 0, BLOCK, 0, 0, grad_scale, hyper,
        tl.bfloat16, "bf16", "master", BLOCK, False, WIDE, WIDE16,
    )  # fmt: skip


def block_at(wide: int, wide16: int) -> Binary:
    addresses = dict.fromkeys(("kept", "weight", "exp_avg", "exp_avg_sq", "gradient"), "i64")
    signature = addresses | {"grad_scale": "fp32", "scalar": "fp32"}
    constants = {"BLOCK": LAUNCH.block, "WIDE": wide, "WIDE16": wide16}
    binary = compile_kernel(one_block, signature, constants, 90, LAUNCH.warps)
    assert binary.count(r"\bSTG") > 0
    return binary


def test_control_at_the_addresses_of_whole_tiles_all_is_well():
    binary = block_at(16, 8)
    require_wide(binary, *VARIANTS["bf16"][1:])
    require_no_conversion(binary)


def test_control_at_unknown_addresses_nothing_is_wide():
    with pytest.raises(AssertionError):
        require_wide(block_at(4, 2), *VARIANTS["bf16"][1:])


def test_control_with_16_bit_tensors_by_eights_layouts_are_converted():
    with pytest.raises(AssertionError):
        require_no_conversion(block_at(16, 16))


def test_control_with_fusion_there_are_fused_operations():
    binary = update_kernel("bf16", 90, enable_fp_fusion=True)
    with pytest.raises(AssertionError):
        require_unfused(binary)


def test_control_with_few_registers_they_spill():
    binary = update_kernel("bf16", 90, maxnreg=32)
    with pytest.raises(AssertionError):
        require_registers_only(binary, 72)
