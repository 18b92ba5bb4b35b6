"""`bench target` on virtual devices in place of absent ones: its rows, what it calls useless, and bad input."""

import gzip
import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.bench import target
from ttt_e2e.cli import main
from ttt_e2e.cluster.mesh import make_mesh, with_shardings
from ttt_e2e.config import MeshConfig
from ttt_e2e.flags import load_config_file, override
from ttt_e2e.targets import Target, facts, slices
from ttt_e2e.targets.products import matmul_flops
from ttt_e2e.targets.program import collectives

CONFIG = """
from ttt_e2e.config import default_config

def get_config(arg=""):
    config = default_config()
    config.model.update(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    config.model.update(num_attention_heads=2, sliding_window=12)
    config.inner.update(mini_batch_size=8, trajectory="store", remat="mini_batch")
    config.train.update(seq_len=32, global_batch_size=8, num_steps=100)
    config.mesh.update(data=4, model=2)
    return config
"""
CHIP = Target("cpu", "cpu", 2**30, 1e12, 1e9, 4, 1e8, 1e7)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The rows of all programs by name, and their directory: virtual devices of which facts are made up."""
    directory = tmp_path_factory.mktemp("target")
    (directory / "config.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "devices", lambda slice_: jax.devices()[: slice_.size])
        patch.setitem(facts.FACTS, "cpu", CHIP)
        flags = [f"--config={directory / 'config.py'}", "--programs=train,read,decode", f"--output={directory}"]
        assert main(["bench", "target", "--target=h100:8", *flags]) == 0
    rows = json.loads((directory / "results.json").read_text())
    return {row["variant"]: row for row in rows}, directory


def test_rows_have_their_figures(results):
    rows, directory = results
    assert list(rows) == ["train", "read", "decode"]
    for row in rows.values():
        assert row["fits"] and row["unknown_trips"] == 0
        positive = "state_bytes temp_bytes needed_bytes flops bound_seconds tokens_per_second_at_bound compile_seconds"
        assert all(row[name] > 0 for name in positive.split())
        assert row["tokens_per_second_at_40%_of_bound"] == pytest.approx(0.4 * row["tokens_per_second_at_bound"])
        assert row["bound_seconds"] == max(row[f"{name}_seconds"] for name in ("products", "memory", "links"))
        assert row[f"{row['binds']}_seconds"] == row["bound_seconds"]
    train = rows["train"]
    assert (train["mesh"], train["inner.trajectory"], rows["decode"]["mesh"]) == ("4x2", "store", "1x1")
    assert train["device_hours_at_bound"] == pytest.approx(100 * train["bound_seconds"] * 8 / 3600)
    text = (directory / "results.md").read_text()
    assert "Kernels of train: none." in text and "| needed, GiB |" in text


def test_the_program_that_was_counted_is_written(results):
    rows, directory = results
    text = gzip.decompress((directory / "program.txt.gz").read_bytes()).decode()
    train = rows["train"]
    assert matmul_flops(text) == train["flops"]
    assert sum(c.received_bytes for c in collectives(text, {"data": 4, "model": 2})) == train["received_bytes"]
    assert train["received_bytes"] == pytest.approx(sum(train["received_bytes_by_kind"].values()))
    assert rows["decode"]["received_bytes"] == rows["decode"]["useless_share"] == 0


def duplicating(whole: bool, config, mesh) -> target.Task:
    """A product of which each device computes its rows, or its rows and `whole` another one that all compute alike."""

    def products(x, w):
        own = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]
        return own + (w @ w).sum() if whole else own

    mapped = jax.shard_map(products, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    shapes = (jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32))
    placed = (NamedSharding(mesh, P("data")), NamedSharding(mesh, P()))
    return target.Task(jax.jit(mapped), with_shardings(shapes, placed), 64)


@pytest.mark.parametrize("whole", [True, False])
def test_useless_is_what_devices_compute_alike(whole):
    mesh = jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    make = partial(duplicating, whole)
    task = make(None, mesh)
    text = task.function.lower(*task.arguments).compile().as_text()
    own, alike = 3 * 2 * 8 * 16 * 16, 2 * 16 * 16 * 16  # of each device
    flops = matmul_flops(text)
    assert flops == own + whole * alike
    share = target._useless_share(flops, make, None, mesh)
    assert share == pytest.approx(7 * alike / (8 * (own + alike)) if whole else 0)
    # The control: were loops counted once, another share would come out wherever something is computed alike.
    once = matmul_flops(text.replace("known_trip_count", "unknown").replace("direction=LT", "direction=unknown"))
    assert (target._useless_share(once, make, None, mesh) == pytest.approx(share)) == (once == flops)


@pytest.mark.slow
def test_xla_drops_no_product_of_a_step_and_adds_none(results):
    """What `useless_share` rests on: one device's step has the same products before and after XLA.

    But for those of vectors, of which XLA makes sums, and in loops of one trip, which it dissolves: few at these sizes.
    """
    _, directory = results
    values = load_config_file(str(directory / "config.py"))
    values.model.update(
        num_hidden_layers=4, num_fast_blocks=2, hidden_size=32, intermediate_size=64, sliding_window=256
    )
    values.train.seq_len, values.inner.mini_batch_size = 1024, 256
    config = override(values, [])
    _, lowered = target._lower(target._train, config, make_mesh(MeshConfig(data=1)))
    before, after = matmul_flops(lowered.as_text("hlo")), matmul_flops(lowered.compile().as_text())
    assert after == pytest.approx(before, rel=1e-3)


def test_what_the_compiler_refuses_is_an_answer(results, monkeypatch, tmp_path, capsys):
    class Refusing:
        def lower(self, *_):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory\nin memory space hbm\n")

    _, directory = results
    monkeypatch.setattr(slices, "devices", lambda slice_: jax.devices()[: slice_.size])
    monkeypatch.setitem(target.PROGRAMS, "train", lambda *_: target.Task(Refusing(), (), 1))
    flags = ["--target=h100:8", f"--config={directory / 'config.py'}", f"--output={tmp_path}"]
    assert main(["bench", "target", *flags]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert (row["fits"], row["refused"]) == (False, "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
    assert "refused by the compiler" in capsys.readouterr().out


def test_what_needs_more_memory_does_not_fit(monkeypatch):
    class Compiled:
        def memory_analysis(self):
            fields = ("argument", "output", "alias", "temp", "generated_code")
            return type("", (), {f"{name}_size_in_bytes": 100 for name in fields})()

    assert target._memory(Compiled(), "tpu", 400) == {
        "fits": True,
        "needed_bytes": 300,
        "state_bytes": 100,
        "temp_bytes": 100,
        "code_bytes": 100,
    }
    assert [target._memory(Compiled(), *of)["fits"] for of in (("gpu", 390), ("gpu", 410), ("tpu", 299))] == [
        False,
        True,
        False,
    ]


BAD_INPUT = {
    "--target=": "--target is missing",
    "--target=h10:8": "--target=h10:8: there is no accelerator 'h10': did you mean 'h100'?",
    "--target=h100": "--target=h100: it takes h100:N",
    "--target=h100:0": "--target=h100:0: it takes h100:N",
    "--target=h100:2x4": "--target=h100:2x4: it takes h100:N",
    "--target=h100:12": "--target=h100:12: it takes up to 8 devices, or whole hosts of 8",
    "--target=v5p:8": "--target=v5p:8: it takes v5p:AxBxC",
    "--target=v5e:4x4x4": "--target=v5e:4x4x4: it takes v5e:AxB",
    "--target=v6e:99999x99999": "at most 16384 devices",
    "--programs=trian": "--programs=trian: did you mean 'train'?",
    "--config=no.py": "config file no.py does not exist",
    "--config.mesh.data=3": "config.mesh is data=3 x model=2, which leaves some of the 8 devices of h100:8 out",
    "--config.mesh.data=16": "config.mesh is data=16 x model=2, which does not fit 8 device(s)",
    "--config.model.attention_backend=splash": "config.model.attention_backend is 'splash', which",
    "--config.train.global_batch_size=9": "config.train.global_batch_size is 9, but it must be a multiple of 4",
}


@pytest.mark.parametrize("flag", BAD_INPUT)
def test_bad_flags_are_one_line(flag, results, monkeypatch, tmp_path, capsys):
    _, directory = results
    monkeypatch.setattr(slices, "devices", lambda slice_: jax.devices()[: slice_.size])
    given = {"--target": "h100:8", "--config": directory / "config.py", "--output": tmp_path / "out"}
    flags = [f"{name}={value}" for name, value in given.items()]
    assert main(["bench", "target", *flags, flag]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1].count("error: ")) == ("", 1)
    assert BAD_INPUT[flag] in err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("name, extra", [("h100:8", "targets-cuda"), ("v5p:2x2x2", "targets-tpu")])
def test_a_missing_compiler_is_one_line_that_says_what_to_install(name, extra, results, monkeypatch, tmp_path, capsys):
    _, directory = results
    monkeypatch.setattr(slices, "_is_installed", lambda module: False)
    flags = [f"--target={name}", f"--config={directory / 'config.py'}", f"--output={tmp_path / 'out'}"]
    assert main(["bench", "target", *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: compiling for this target takes the extra {extra}: pip install 'ttt-e2e[{extra}]'"
    ]


def test_programs_of_an_earlier_call_do_not_stay(tmp_path, monkeypatch):
    """Nothing is compiled here."""
    (tmp_path / "config.py").write_text(CONFIG)
    for name in ("program.txt.gz", "program_read.txt.gz", "notes.txt.gz"):
        (tmp_path / name).touch()
    monkeypatch.setattr(slices, "devices", lambda slice_: jax.devices()[: slice_.size])
    monkeypatch.setattr(target, "_examine", lambda name, *_: ({"variant": name}, ""))
    monkeypatch.setattr(target, "_shown", lambda rows: rows)
    flags = [f"--config={tmp_path / 'config.py'}", "--programs=train", f"--output={tmp_path}"]
    assert main(["bench", "target", "--target=h100:8", *flags]) == 0
    assert [path.name for path in sorted(tmp_path.glob("*.gz"))] == ["notes.txt.gz"]
