"""FLOPs of matrix products, as counted from a program's text: of programs whose products are known, of lines that the
compilers for GPU and TPU wrote, and of real steps, where the count before XLA is that after it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.targets.products import _visible, kernels, matmul_flops, uncounted
from ttt_e2e.targets.program import Program


def texts(function, *shapes) -> tuple[str, str]:
    """The program before and after XLA."""
    lowered = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return lowered.as_text("hlo"), lowered.compile().as_text()


def in_a_loop(x, w):
    def inner(x, _):
        return jnp.tanh(x @ w), None

    def outer(x, _):
        return jax.lax.scan(inner, x, length=5)[0] @ w, None

    return jax.lax.scan(outer, x, length=3)[0]


KNOWN = {
    "one": (jnp.matmul, ((6, 7), (7, 8)), 2 * 6 * 7 * 8),
    "batched": (lambda x, w: jnp.einsum("bij,bkj->bik", x, w), ((3, 6, 7), (3, 8, 7)), 2 * 3 * 6 * 7 * 8),
    "over two axes": (lambda x, w: jnp.einsum("ijk,jkl->il", x, w), ((6, 3, 7), (3, 7, 8)), 2 * 6 * 21 * 8),
    "in nested loops": (in_a_loop, ((6, 7), (7, 7)), (15 + 3) * 2 * 6 * 7 * 7),
    "none": (jnp.add, ((6, 7), (6, 7)), 0),
}


@pytest.mark.parametrize("case", KNOWN)
def test_products_whose_flops_are_known(case):
    function, shapes, flops = KNOWN[case]
    assert [matmul_flops(text) for text in texts(function, *shapes)] == [flops, flops]


def program(lines: str, called: str = "") -> str:
    return f"HloModule m\n{called}\nENTRY %main (x: f32[]) -> f32[] {{\n{lines}\n}}\n"


OPERANDS = """  %a = bf16[8,1024,192]{2,1,0} parameter(0)
  %b = bf16[8,192,768]{2,1,0} parameter(1)
"""
FUSED = """
%nested (p: bf16[2048,192], q: bf16[192,16032]) -> f32[2048,16032] {
  %p = bf16[2048,192]{1,0} parameter(0)
  %q = bf16[192,16032]{1,0} parameter(1)
  ROOT %dot.565 = f32[2048,16032]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
ATTENTION = (
    "  %q = bf16[2,8192,6,64]{3,2,1,0} parameter(0)\n"
    "  %x = (bf16[2,6,8192,64]{3,1,2,0}, f32[2,6,8192]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), "
    'custom_call_target="TARGET", api_version=API_VERSION_STATUS_RETURNING, '
    'backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": '
    '{"element_type": "BF16", "dimensions": ["2", "6", "8192", "8192"], "tuple_shapes": []}, "mask_type": "MASK", '
    '"bmm1_dot_dimension_numbers": {"lhs_contracting_dimensions": ["3"]}, "sliding_window_length": WINDOW}}'
)


def attention(target: str, mask: str, window: int) -> str:
    text = ATTENTION.replace("TARGET", target).replace("MASK", mask).replace("WINDOW", str(window))
    return program(text)


# What other compilers write, shortened; and the FLOPs, by hand.
WRITTEN = {
    "cuBLAS": (
        program(
            OPERANDS + "  %x = (bf16[8,1024,768]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), "
            'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}'
        ),
        2 * 8 * 1024 * 192 * 768,
    ),
    "cuBLASLt": (
        program(
            OPERANDS + '  %x = bf16[8,1024,768]{2,1,0} custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}'
        ),
        2 * 8 * 1024 * 192 * 768,
    ),
    "cuBLAS, a triangular system": (
        program(
            "  %a = f32[5,64,64]{2,1,0} parameter(0)\n  %b = f32[5,64,288]{1,2,0} parameter(1)\n"
            "  %x = (f32[5,64,288]{1,2,0}, s8[2560]{0}) custom-call(%a, %b), "
            'custom_call_target="__cublas$triangularSolve", backend_config={"left_side":true,"lower":true}'
        ),
        5 * 64 * 64 * 288,
    ),
    "Triton": (
        program("  %x = f32[2048,16032]{1,0} fusion(%a, %b), kind=kCustom, calls=%nested", FUSED),
        2 * 2048 * 192 * 16032,
    ),
    "cuDNN, causal": (attention("__cudnn$fmhaSoftmax", "CAUSAL", 8192), 2 * 2 * 12 * 64 * 8192 * 8193 // 2),
    "cuDNN, window": (
        attention("__cudnn$fmhaSoftmax", "CAUSAL", 512),
        2 * 2 * 12 * 64 * (8192 * 512 - 512 * 511 // 2),
    ),
    "cuDNN, its reverse": (
        attention("__cudnn$fmhaSoftmaxBackward", "CAUSAL", 0),
        5 * 2 * 12 * 64 * 8192 * 8193 // 2,
    ),
    "cuDNN, all": (attention("__cudnn$fmhaSoftmax", "NO_MASK", 0), 2 * 2 * 12 * 64 * 8192**2),
    "TPU": (
        program(
            "  %a = bf16[1024,192]{1,0:T(8,128)(2,1)} parameter(0)\n"
            "  %b = bf16[192,768]{1,0:T(8,128)(2,1)} parameter(1)\n"
            "  %x = bf16[1024,768]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf"
        ),
        2 * 1024 * 192 * 768,
    ),
    # A batch dimension as one of space: each result's window holds all of the batch, and meets the one of its own.
    "TPU, batched": (
        program(
            "  %a = bf16[8,1024,192]{2,1,0} parameter(0)\n  %b = bf16[8,192,768]{2,1,0} parameter(1)\n"
            "  %x = bf16[8,1024,768]{2,1,0} convolution(%a, %b), "
            "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
        ),
        2 * 8 * 1024 * 192 * 768,
    ),
    "Pallas on TPU, which says what it costs": (
        program(
            '  %x = f32[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", '
            'backend_config={"custom_call_config": {"body": "TUzv", "cost_estimate": {"flops": "1234"}}}'
        ),
        1234,
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_forms_that_other_compilers_write(case):
    text, flops = WRITTEN[case]
    assert matmul_flops(text) == flops


@pytest.mark.parametrize(
    "stride, pad, holes, step", [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (3, 3, 2, 2), (7, 0, 8, 1)]
)
def test_convolutions_count_as_xla_counts_them(stride, pad, holes, step):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, [stride], [(pad, pad)], lhs_dilation=[holes], rhs_dilation=[step])

    lowered = jax.jit(convolve).lower(jnp.ones((2, 3, 16)), jnp.ones((5, 3, 4)))
    assert matmul_flops(lowered.as_text("hlo")) == lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("T, S, window", [*itertools.product((1, 5), (5, 8), (0, 1, 3, 8))])
def test_visible_scores_are_those_of_the_mask(T, S, window):
    distance = np.arange(S - T, S)[:, None] - np.arange(S)
    mask = (distance >= 0) & (distance < (window or S))
    assert _visible(T, S, window, causal=True) == mask.sum()


def test_kernels_are_named_and_counted():
    body = attention("__cudnn$fmhaSoftmax", "CAUSAL", 0).partition("ENTRY")[2].partition("\n")[2].partition("\n}")[0]
    text = program(
        '  %w = s32[] while(%x), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"6"}}\n'
        '  %s = f32[8]{0} custom-call(%y), custom_call_target="Sharding"',
        f"%b (x: s32[]) -> s32[] {{\n{body}\n}}\n",
    )
    assert kernels(Program(text)) == {"__cudnn$fmhaSoftmax": 6}


def test_kernels_that_do_not_say_what_they_compute_are_named():
    call = '  %{0} = f32[8]{{0}} custom-call(%y), custom_call_target="{1}", backend_config={{{2}}}'
    lines = [
        call.format("a", "mosaic_gpu_v2", ""),
        call.format("b", "tpu_custom_call", '"custom_call_config": {"cost_estimate": {"flops": "7"}}'),
        call.format("c", "Sharding", ""),
    ]
    read = Program(program("\n".join(lines)))
    assert (uncounted(read), matmul_flops(read)) == (["mosaic_gpu_v2"], 7)
    assert kernels(read) == {"mosaic_gpu_v2": 1, "tpu_custom_call": 1}


def test_a_kernel_that_says_its_products_in_the_metadata_is_counted_and_named():
    """As the kernels for Hopper GPUs do: their compiler leaves one name for all, and no cost."""
    text = """
ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} custom-call(%a), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/dual_of_120_flops/mpmd_map"}
  ROOT %c = bf16[8,16]{1,0} custom-call(%b), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/mpmd_map"}
}
"""  # noqa: E501
    program = Program(text)
    assert matmul_flops(program) == 120
    assert kernels(program) == {"mosaic_gpu_v2": 1, "mosaic_gpu_v2:dual": 1}
    assert uncounted(program) == ["mosaic_gpu_v2"]
