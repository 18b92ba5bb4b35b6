"""What devices receive, as counted from a program's text: of programs compiled for eight virtual devices, and of lines
that the compilers for GPU and TPU wrote."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.targets.program import Program, collectives

MESH = {"data": 4, "model": 2}
X = P("data", "model")


def compiled(function, spec_in=X, spec_out=X, shape=(64, 32)) -> str:
    """The program of a function of each device's part of a float32 array."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    run = jax.shard_map(function, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False)
    return (
        jax.jit(run)
        .lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec_in)))
        .compile()
        .as_text()
    )


def counted(text: str) -> dict:
    return {(c.kind, c.axis): (c.received_bytes, c.times) for c in collectives(text, MESH)}


# A device's part is [16, 16] in float32, 1024 bytes. What it receives, by hand.
CASES = {
    "gather over data": (lambda x: jax.lax.all_gather(x, "data").sum(0), {("all-gather", "data"): (3 * 1024, 1)}),
    "gather over model": (lambda x: jax.lax.all_gather(x, "model").sum(0), {("all-gather", "model"): (1024, 1)}),
    "sum over data": (lambda x: jax.lax.psum(x, "data"), {("all-reduce", "data"): (2 * 1024 * 3 / 4, 1)}),
    "sum over both": (
        lambda x: jax.lax.psum(x, ("data", "model")),
        {("all-reduce", "data+model"): (2 * 1024 * 7 / 8, 1)},
    ),
    "scatter": (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), (4, 1)),
        {("reduce-scatter", "data"): (1024 * 3 / 4, 1)},
    ),
    "all to all": (
        lambda x: jax.lax.all_to_all(x.reshape(4, 4, 16), "data", 0, 0).reshape(16, 16),
        {("all-to-all", "data"): (1024 * 3 / 4, 1)},
    ),
    "neighbour": (
        lambda x: jax.lax.ppermute(x, "model", [(0, 1)]),
        {("collective-permute", "model"): (1024, 1)},
    ),
    "no other device": (lambda x: x * 2, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_received_by_kind_and_axis(case):
    function, expected = CASES[case]
    assert counted(compiled(function)) == expected


def test_loops_are_multiplied_out_nested_ones_too():
    def inner(x, _):
        return jax.lax.psum(jnp.sin(x), "model") / 2, None

    def outer(x, _):
        return jax.lax.all_gather(jax.lax.scan(inner, x, length=5)[0], "data").mean(0), None

    text = compiled(lambda x: jax.lax.scan(outer, x, length=3)[0])
    assert counted(text) == {
        ("all-reduce", "model"): (15 * 1024, 15),
        ("all-gather", "data"): (3 * 3 * 1024, 3),
    }
    # The control: each body once, as a reader would count that does not know of trips.
    once = text.replace("known_trip_count", "unknown").replace("direction=LT", "direction=unknown")
    assert counted(once) == {("all-reduce", "model"): (1024, 1), ("all-gather", "data"): (3 * 1024, 1)}
    assert (Program(text).unknown_trips, Program(once).unknown_trips) == (0, 2)


def test_what_xla_itself_divides_is_counted():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, X))
    text = jax.jit(partial(jnp.multiply, 2), out_shardings=NamedSharding(mesh, P("data"))).lower(x).compile().as_text()
    assert counted(text) == {("all-gather", "model"): (1024, 1)}


# Lines of programs that were compiled for H100s and v5p, shortened: (result and operation, groups) -> what is counted.
LINES = {
    "gather, started": (
        "(f32[192,64128]{0,1}, f32[192,128256]{0,1}) all-gather-start(%x)",
        "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={1}",
        ("all-gather", "model", 192 * 128256 * 4 / 2),
    ),
    "several gathered at once": (
        "((bf16[192,384]{1,0}, /*index=5*/bf16[192,832]{1,0}), (bf16[768,384]{1,0}, bf16[768,832]{1,0})) "
        "all-gather-start(%x, %y)",
        "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}, dimensions={0}",
        ("all-gather", "data", 768 * (384 + 832) * 2 * 3 / 4),
    ),
    "sum, started, whose result is no tuple": (
        "bf16[2,1024,768]{2,1,0} all-reduce-start(%x)",
        "replica_groups=[4,2]<=[8], to_apply=%add",
        ("all-reduce", "model", 2 * 1024 * 768 * 2),
    ),
    "several summed at once": (
        "(f32[], f32[128]{0}) all-reduce-start(%x, %y)",
        "replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
        ("all-reduce", "data+model", 129 * 4 * 2 * 7 / 8),
    ),
    "scatter, started": (
        "((bf16[768,384]{1,0}, bf16[768,832]{1,0}), (bf16[192,384]{1,0}, bf16[192,832]{1,0})) "
        "reduce-scatter-start(%x, %y)",
        "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}",
        ("reduce-scatter", "data", 768 * (384 + 832) * 2 * 3 / 4),
    ),
    "scatter": (
        "f32[192,64128]{1,0:T(8,128)} reduce-scatter(%x)",
        "replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}",
        ("reduce-scatter", "data", 768 * 64128 * 4 * 3 / 4),
    ),
    "all to all, started": (
        "((f32[4,2,192,1024]{3,2,1,0}), f32[4,2,192,1024]{3,2,1,0}) all-to-all-start(%x)",
        "replica_groups=mesh['axis_0'=1,'axis_1'=1,'axis_2'=4,'axis_3'=2] {'axis_2'}, dimensions={0}",
        ("all-to-all", "data", 4 * 2 * 192 * 1024 * 4 * 3 / 4),
    ),
    "all to all of a tuple": (
        "(f32[8]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}) all-to-all(%a, %b, %c, %d)",
        "replica_groups=[2,4]<=[4,2]T(1,0)",
        ("all-to-all", "data", 3 * 8 * 4),
    ),
    "permutation, started": (
        "(bf16[2,1024]{1,0}, bf16[2,1024]{1,0}, u32[], u32[]) collective-permute-start(%x)",
        "source_target_pairs={{0,0},{1,2},{2,4},{3,6},{4,1},{5,3},{6,5},{7,7}}",
        ("collective-permute", "data+model", 2 * 1024 * 2),
    ),
    "permutation that leaves each in place": (
        "f32[8]{0} collective-permute(%x)",
        "source_target_pairs={{0,0},{1,1}}",
        None,
    ),
    "all devices, unsaid": (
        "f32[8]{0} all-reduce(%x)",
        "replica_groups={}",
        ("all-reduce", "data+model", 8 * 4 * 2 * 7 / 8),
    ),
    "a mesh in another order": (
        "(f32[], f32[128]{0}) all-reduce(%x, %y)",
        "replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}, to_apply=%add",
        ("all-reduce", "data", 129 * 4 * 2 * 3 / 4),
    ),
    "a part of an axis": (
        "f32[8]{0} all-gather(%x)",
        "replica_groups=mesh['a'=8] {'a':(4)2}, dimensions={0}",
        ("all-gather", "model", 4 * 4),
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_forms_that_other_compilers_write(case):
    operation, groups, expected = LINES[case]
    line = f'  ROOT %x.1 = {operation}, channel_id=1, {groups}, metadata={{op_name="jit(f)/dot"}}'
    found = collectives(f"HloModule m\n\nENTRY %main (x: f32[]) -> f32[] {{\n{line}\n}}\n", MESH)
    assert found == ([(*expected, 1, "jit(f)/dot")] if expected else [])


def test_what_runs_asynchronously_counts_once():
    text = """HloModule m

%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%x), calls=%wrapped
  ROOT %done = f32[2]{0} async-done(%start), calls=%wrapped
}
"""
    assert counted(text) == {("reduce-scatter", "data"): (8 * 4 * 3 / 4, 1)}


def test_a_sum_of_which_each_keeps_a_part_is_a_reduce_scatter():
    text = """HloModule m

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %fused = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert counted(text) == {("reduce-scatter", "data"): (8 * 4 * 3 / 4, 1)}


def test_groups_in_an_unknown_form_are_no_zero():
    text = "ENTRY %main (x: f32[]) -> f32[] {\n  ROOT %y = f32[8]{0} all-gather(%x), replica_groups=somehow\n}\n"
    with pytest.raises(ValueError, match="form that is not known"):
        collectives(text, MESH)
