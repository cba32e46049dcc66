"""Static schedules of the TPU decode kernel, without a TPU: instruction bundles per KV block against its time in HBM.

python -m bench.tpu_schedule [--targets v5e:2x2 v6e:2x4 tpu7x:2x2x1] [--shapes 32/8/128 4/1/128]
    [--page-size 128] [--output FILE]

libtpu compiles the kernel for each target and writes its final schedule; a bundle is what a core issues in a cycle. Of
the loop over blocks, counted once, the path of an unmasked block: fetching the next, waiting, the products; without the
copy of the body that a row's last block takes. Cycles spent waiting for memory are not in a schedule, and clocks are
assumed: this compares versions of a kernel and shows which side of the balance it is on. It is no measurement.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Name -> (clock in GHz, assumed; HBM bytes per second a core, published).
CHIPS = {"v5e": (1.5, 819e9), "v6e": (1.75, 1640e9), "tpu7x": (1.9, 3700e9)}
CONTEXT, NUM_ROWS = 4096, 64
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z ,]*):\s*([> ]*)\{")


@dataclass(frozen=True)
class Schedule:
    """Bundles of the loop over KV blocks; block_tokens tokens of all heads are attended to in one turn."""

    target: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    unmasked: int  # bundles of a turn that is not a row's last
    masked: int  # of one that is
    spills: int  # vector registers stored to memory and loaded back, in the whole loop

    @property
    def block_bytes(self) -> int:
        lanes = max(self.head_dim * 2, 128)
        return self.block_tokens * self.num_kv_heads * lanes * 2

    @property
    def issue_ns(self) -> float:
        return self.unmasked / CHIPS[self.target.partition(":")[0]][0]

    @property
    def memory_ns(self) -> float:
        return self.block_bytes / CHIPS[self.target.partition(":")[0]][1] * 1e9


def turns(text: str) -> tuple[int, int]:
    """A final schedule -> bundles of an unmasked and of a masked turn of the outermost loop that is the longest.

    Bundles at depth 1 lie in that loop. Its two longest regions between branches that fall through are the masked and,
    after it, the unmasked body.
    """
    regions = [0]
    for line in text.splitlines():
        found = _BUNDLE.match(line)
        if found is None or found.group(2).count(">") != 1:
            continue
        if "PF" in found.group(1):
            regions.append(0)
        regions[-1] += 1
    masked, unmasked = sorted(sorted(range(len(regions)), key=regions.__getitem__)[-2:])
    total = sum(regions)
    return total - regions[masked], total - regions[unmasked]


def compile_here(target: str, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int) -> int:
    """Compile the decode kernel for one chip of a target, in this process. -> tokens in a block."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kernels_pallas import tpu_decode
    from kernels_pallas.cache import LANES, rows_per_page

    devices = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[:1]
    mesh = Mesh(np.asarray(devices), ("tp",))
    rows, max_pages = rows_per_page(num_kv_heads, head_dim), CONTEXT // page_size

    def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def attend(q, new, pages, layer, table, lens):
        (work,) = tpu_decode.plan(table, lens, page_size)
        return tpu_decode.attend(q, new, pages, layer, work, num_kv_heads=num_kv_heads)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(attend, donate_argnums=2).lower(
            array(jnp.bfloat16, NUM_ROWS, num_heads, head_dim),
            array(jnp.bfloat16, NUM_ROWS, rows, LANES),
            array(jnp.bfloat16, 4, NUM_ROWS * max_pages + 1, rows, page_size, LANES),
            array(jnp.int32),
            array(jnp.int32, NUM_ROWS, max_pages),
            array(jnp.int32, NUM_ROWS),
        ).compile()
    pages = tpu_decode.pages_per_block(rows, page_size, max_pages, 2, tpu_decode.MAX_BLOCK_TOKENS)
    return pages * page_size


def measure(target: str, shape: Sequence[int], page_size: int) -> Schedule:
    """In a child, since the compiler reads what to write down only once."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", "bench.tpu_schedule", "--compile", target, *map(str, (*shape, page_size))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{target} {shape}: {done.stderr[-2000:]}")
        found = [p for p in Path(folder).glob("*paged_decode*-final_bundles.txt") if "analysis" not in p.name]
        text = max(found, key=lambda path: path.stat().st_size).read_text()
    unmasked, masked = turns(text)
    in_loop = [line for line in text.splitlines() if (b := _BUNDLE.match(line)) and ">" in b.group(2)]
    spills = sum(len(re.findall(r"v(?:st|ld) \[vmem:\[#allocation\d+_spill", line)) for line in in_loop)
    return Schedule(target, *shape, int(done.stdout.split()[-1]), unmasked, masked, spills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["v5e:2x2", "v6e:2x4", "tpu7x:2x2x1"])
    parser.add_argument(
        "--shapes", nargs="+", default=["32/8/128", "4/1/128", "9/3/64"], help="heads/kv heads/head dim"
    )
    parser.add_argument("--page-size", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--compile", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        target, *shape = options.compile
        print(compile_here(target, *map(int, shape)))
        return
    print(
        "| target | heads | block | bundles | last block | spills | issue | memory |\n|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for target in options.targets:
        for shape in options.shapes:
            row = measure(target, [int(part) for part in shape.split("/")], options.page_size)
            counts = f"{row.block_tokens} | {row.unmasked} | {row.masked} | {row.spills}"
            print(f"| {target} | {shape} | {counts} | {row.issue_ns:.0f} ns | {row.memory_ns:.0f} ns |", flush=True)
            rows.append(asdict(row) | {"issue_ns": row.issue_ns, "memory_ns": row.memory_ns})
    if options.output:
        Path(options.output).write_text(
            json.dumps({"page_size": options.page_size, "schedules": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
