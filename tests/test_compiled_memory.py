"""What fills temporary memory: followed through the program, against the compiler's own figure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.planner.compiled import compile_lowered
from shardtrain.planner.hlo import parse_hlo
from shardtrain.planner.temporaries import Buffer, temporaries_at_peak

WIDTH, BATCH = 128, 1024


def compiled_mlp(devices, layers, remat, scan):
    mesh = Mesh(
        np.array(devices).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )

    def abstract(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def kernels(*lead):
        none = (None,) * len(lead)
        return {
            "up": abstract((*lead, WIDTH, 4 * WIDTH), *none, None, "tensor"),
            "down": abstract((*lead, 4 * WIDTH, WIDTH), *none, "tensor"),
        }

    params = kernels(layers) if scan else [kernels() for _ in range(layers)]

    def layer(x, w):
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

    def loss(params, x):
        body = jax.checkpoint(layer) if remat else layer
        if scan:
            x = jax.lax.scan(body, x, params)[0]
        else:
            for w in params:
                x = body(x, w)[0]
        return jnp.mean(x**2)

    def step(params, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

    jitted = jax.jit(
        step, donate_argnums=0, out_shardings=jax.tree.map(lambda p: p.sharding, params)
    )
    return compile_lowered(jitted.lower(params, abstract((BATCH, WIDTH), "data")), mesh)


@pytest.mark.parametrize(
    ("layers", "remat", "scan"), [(4, False, True), (4, True, True), (3, False, False)]
)
def test_followed_temporaries_are_near_the_compilers_figure(devices, layers, remat, scan):
    found = compiled_mlp(devices, layers, remat, scan)
    total, largest = temporaries_at_peak(parse_hlo(found.hlo))
    assert found.temp_bytes is not None
    assert 0.9 < total / found.temp_bytes < 1.1
    assert largest == found.temporaries
    assert [b.bytes for b in largest] == sorted((b.bytes for b in largest), reverse=True)


def test_residuals_of_a_scan_are_the_largest_and_are_named(devices):
    found = compiled_mlp(devices, 4, remat=False, scan=True)
    residuals = found.temporaries[0]
    # Stacked over layers, the hidden activations on one device: batch over data=4, width over 2.
    assert residuals.type == f"f32[4,{BATCH // 4},{4 * WIDTH // 2}]"
    assert residuals.bytes == residuals.count * 4 * 4 * (BATCH // 4) * (4 * WIDTH // 2)
    assert residuals.source.startswith(__file__)
    assert "while" in residuals.operation_name


HAND = """HloModule hand, is_scheduled=true

%add_one (p: f32[64]) -> f32[64] {
  %p = f32[64] parameter(0)
  %scratch = f32[256] custom-call(%p), custom_call_target="a"
  ROOT %r = f32[64] custom-call(%scratch), custom_call_target="b"
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64] parameter(0)
  %a = f32[64] exponential(%x)
  %b = f32[128] custom-call(%a), custom_call_target="wide", metadata={op_name="wide"}
  %view = f32[128] bitcast(%b)
  %c = f32[64] custom-call(%view), custom_call_target="narrow"
  %d = f32[64] call(%c), to_apply=%add_one
  ROOT %e = f32[64] add(%d, %x)
}
"""


def test_by_hand():
    total, largest = temporaries_at_peak(parse_hlo(HAND))
    # In the call: %c, %d and the callee's scratch are alive. Before it: %b and %c, or %a and %b.
    assert total == 4 * (64 + 64 + 256)
    assert largest[0] == Buffer(1024, "", "", "f32[256]", 1)
    assert str(largest[0]) == "1 x f32[256] from made by the compiler"


def test_in_place_updates_and_results_take_no_temporary_memory():
    text = """HloModule hand
ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64] parameter(0)
  %i = s32[] constant(3)
  %one = f32[1] constant({1})
  %fresh = f32[64] negate(%x)
  %u = f32[64] dynamic-update-slice(%fresh, %one, %i)
  ROOT %v = f32[64] dynamic-update-slice(%u, %one, %i)
}
"""
    assert temporaries_at_peak(parse_hlo(text)) == (0, ())


def test_arrays_in_other_memory_are_left_out():
    text = """HloModule hand
ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64] parameter(0)
  %host = f32[64]{0:S(5)} negate(%x)
  %near = f32[64]{0} negate(%host)
  ROOT %v = f32[64] add(%near, %x)
}
"""
    total, largest = temporaries_at_peak(parse_hlo(text))
    assert total == 256
    assert [b.bytes for b in largest] == [256]
