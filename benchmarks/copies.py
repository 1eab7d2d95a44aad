"""Finding copies: the exact self-join, the join in buckets, and connected components, against FAISS. Writes
benchmarks/results/.

    python benchmarks/copies.py [--exact 100000] [--rows 250000 500000 1000000] [--peer-rows 1000000] [--hnsw-rows 100000]
                                [--nodes 40000000] [--rounds 3] [--only exact buckets components]

Vectors are random around centres of very different sizes; a tenth are planted at a cosine of 0.45 to 1 to another one. One
thread everywhere; a figure is CPU seconds of this process and its children. Ours ends in Parquet files, FAISS's in memory.
Before any timing both must have found the same pairs.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from results_file import cpu_hardware, today, versions, write_result

from heliostat.curation import products
from heliostat.curation.components import components_of_files, connected_components, hang
from heliostat.curation.copies_config import JoinConfig
from heliostat.curation.edges import Edges, edges_key, iterate_edges, make_edges, write_edges
from heliostat.curation.join import JoinSummary, self_join
from heliostat.curation.products import operand, similar_pairs
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors, Block
from heliostat.storage import LocalStore

FLOOR = 0.45
NEIGHBORS = 64
SAMPLED_QUERIES = 2_000
TIMED_QUERIES = 20_000


def cpu_seconds() -> float:
    """Of this process and the children it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns, and its CPU seconds."""
    started = cpu_seconds()
    result = work()
    return result, cpu_seconds() - started


def spread(values: list[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def planted(num_rows: int, dimension: int) -> NDArray[np.float16]:
    """Unit vectors: 2,000 centres whose sizes follow a power law, and a tenth planted near another vector."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((2_000, dimension), dtype=np.float32)
    size = generator.pareto(1.2, 2_000) + 0.05
    vectors = generator.standard_normal((num_rows, dimension), dtype=np.float32)
    vectors += 0.6 * centres[generator.choice(2_000, num_rows, p=size / size.sum())]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    copies = generator.permutation(num_rows)[: num_rows // 10]
    originals = vectors[generator.integers(num_rows, size=len(copies))]
    cosine = generator.uniform(0.45, 1.0, (len(copies), 1)).astype(np.float32)
    aside = generator.standard_normal(originals.shape, dtype=np.float32)
    aside -= (aside * originals).sum(axis=1, keepdims=True) * originals
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    vectors[copies] = cosine * originals + np.sqrt(1 - cosine**2) * aside
    return vectors.astype(np.float16)


def rate(dtype: torch.dtype, dimension: int) -> float:
    """Multiply-adds per second of a product of two 1,024-row tiles: the limit of any exact comparison here."""
    values = torch.randn(1024, dimension).to(dtype)
    out = torch.empty((1024, 1024), dtype=dtype)
    torch.mm(values, values.T, out=out)
    best = min(timed(lambda: [torch.mm(values, values.T, out=out) for _ in range(50)])[1] for _ in range(3))
    return 50 * 1024 * 1024 * dimension / max(best, 1e-3)


def joined(vectors: NDArray[np.float16], **settings: Any) -> tuple[JoinSummary, Edges]:
    """Our join, from vectors in memory to Parquet files and back."""
    config = JoinConfig(edge_floor=FLOOR, neighbors=NEIGHBORS, **settings)
    with tempfile.TemporaryDirectory() as folder:
        files, work = LocalStore(Path(folder) / "files"), LocalStore(Path(folder) / "work")
        summary = self_join(ArrayVectors(vectors), files=files, prefix="e/", work=work, config=config, run=run_serially)
        parts = list(iterate_edges(files, "e/"))
    return summary, make_edges(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def flat_range(vectors: NDArray[np.float32]) -> Edges:
    """FAISS, every pair: IndexFlatIP.range_search."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    first, second, similarity = [], [], []
    for start in range(0, len(vectors), 8192):
        limits, found, rows = index.range_search(vectors[start : start + 8192], FLOOR)
        first.append(np.repeat(np.arange(start, start + len(limits) - 1), np.diff(limits.astype(np.int64))))
        second.append(rows)
        similarity.append(found)
    return make_edges(np.concatenate(first), np.concatenate(second).astype(np.int64), np.concatenate(similarity))


def product_only(vectors: NDArray[np.float16], dtype: torch.dtype) -> Edges:
    """Our kernel alone with one type of the fast product, in memory."""
    block = operand(Block(np.arange(len(vectors)), vectors))
    block = products.Operand(block.rows, block.stored, torch.from_numpy(vectors).to(dtype))
    return make_edges(*similar_pairs(block, block, FLOOR, neighbors=NEIGHBORS, same=True))


def missed(ours: Edges, theirs: Edges) -> tuple[int, int]:
    """Pairs one has and the other has not, those within 1e-4 of the floor left out: FAISS rounds there."""
    keys = [set((edges.first * 2**32 + edges.second)[edges.similarity > FLOOR + 1e-4].tolist()) for edges in (ours, theirs)]
    return len(keys[1] - keys[0]), len(keys[0] - keys[1])


def exact(num_rows: int, rounds: int) -> list[str]:
    """Rows for the exact self-join."""
    dimension = 384
    vectors = planted(num_rows, dimension)
    single = vectors.astype(np.float32)
    ways: dict[str, Callable[[], Edges]] = {
        "ours, self_join to Parquet with its audit": lambda: joined(vectors, via="exact")[1],
        "ours, products in bfloat16 alone": lambda: product_only(vectors, torch.bfloat16),
        "ours, products in float32 alone": lambda: product_only(vectors, torch.float32),
        "FAISS IndexFlatIP.range_search": lambda: flat_range(single),
    }
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        found = {}
        for name, work in ways.items():
            found[name], seconds = timed(work)
            costs[name].append(seconds)
        if number == 0:
            *own, theirs = found.values()
            gates = [missed(edges, theirs) for edges in own]
            assert all(gate == (0, 0) for gate in gates), f"the ways differ: {gates}"
    *_, theirs = costs.values()
    rows = []
    for name, values in costs.items():
        ratios = [other / mine for mine, other in zip(values, theirs, strict=True)]
        rows.append(f"| {name} | {spread(values)} | {spread(ratios)} |")
    for dtype in (torch.bfloat16, torch.float32):
        limit = num_rows**2 / 2 * dimension / rate(dtype, dimension)
        rows.append(f"| limit: N^2/2 products at the measured {str(dtype)[6:]} rate | {limit:.2f} | |")
    search, seconds = timed(lambda: _flat_search(single, min(num_rows, TIMED_QUERIES)))
    del search
    rows.append(
        f"| FAISS IndexFlatIP.search k=65, {min(num_rows, TIMED_QUERIES):,} queries scaled up | "
        f"{seconds * num_rows / min(num_rows, TIMED_QUERIES):.2f} | |"
    )
    return [
        f"## Every pair: {num_rows:,} x {dimension}",
        "",
        f"The same {theirs_count(found)} pairs from {FLOOR} on in all ways (recall 1.000). {rounds} rounds, interleaved.",
        "",
        "| way | CPU s | times faster than FAISS's range_search |",
        "| --- | --- | --- |",
        *rows,
        "",
    ]


def theirs_count(found: dict[str, Edges]) -> str:
    """Pairs of the last way."""
    return f"{list(found.values())[-1].num_edges:,}"


def _flat_search(vectors: NDArray[np.float32], num_queries: int) -> object:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index.search(vectors[:num_queries], NEIGHBORS + 1)


def bands(summary: JoinSummary) -> str:
    """Recall by band, in cells."""
    return " | ".join("-" if band.recall is None else f"{band.recall:.3f}" for band in summary.audit.bands)


def growth(sizes: list[int], dimension: int) -> tuple[list[str], float]:
    """Rows for the join in buckets by number of images, and its recall at the last size."""
    rows, recall = [], 0.0
    vectors = planted(max(sizes), dimension)
    for size in sizes:
        # A prefix of the same pool: of pairs planted between all, those within the prefix are left.
        for via in ("buckets", "exact"):
            (summary, _), seconds = timed(lambda size=size, via=via: joined(vectors[:size], via=via, audit_rows=20_000))
            rows.append(
                f"| {via} | {size:,} | {seconds:.1f} | {1e6 * seconds / size:.0f} | {summary.num_edges:,} | {bands(summary)} |"
            )
            print(rows[-1], flush=True)  # the largest take minutes
            if via == "buckets":
                recall = summary.audit.recall or 0.0
    return rows, recall


@dataclass(frozen=True)
class Truth:
    """Exact pairs of sampled queries from the floor on: (query, row) as one number, 64 best each."""

    queries: NDArray[np.int64]
    keys: NDArray[np.int64]


def truth_of(vectors: NDArray[np.float32]) -> Truth:
    """By products in float32."""
    queries = np.sort(np.random.default_rng(1).choice(len(vectors), SAMPLED_QUERIES, replace=False))
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    similarity, rows = index.search(vectors[queries], NEIGHBORS + 1)
    return Truth(queries, _keys(queries, similarity, rows))


def _keys(queries: NDArray[np.int64], similarity: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    pairs = queries[:, None] * 2**32 + rows
    return pairs[(similarity >= FLOOR) & (rows >= 0) & (rows != queries[:, None])]


def peer(name: str, vectors: NDArray[np.float32], truth: Truth, wanted: float, settings: tuple[str, tuple[int, ...]]) -> str:
    """One row: building, and searching with the first setting whose recall reaches what is wanted."""
    index = faiss.index_factory(vectors.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    training = vectors[:: max(1, len(vectors) // 200_000)]
    if name.endswith("RFlat"):
        index.k_factor = 4  # candidates that are scored again, as ours
    _, building = timed(lambda: (index.train(training), index.add(vectors)))
    parameter, values = settings
    for value in values:
        faiss.ParameterSpace().set_index_parameter(index, parameter, value)
        recall = np.isin(truth.keys, _keys(truth.queries, *index.search(vectors[truth.queries], NEIGHBORS + 1))).mean()
        if recall >= wanted:
            break
    count = min(TIMED_QUERIES, len(vectors))
    _, searching = timed(lambda: index.search(vectors[:count], NEIGHBORS + 1))
    searching *= len(vectors) / count
    total = f"{building:.0f} + {searching:.0f} = {building + searching:.0f}"
    return f"| FAISS {name}, {parameter}={value} | {len(vectors):,} | {recall:.3f} | {total} |"


def against_indexes(num_rows: int, hnsw_rows: int, dimension: int) -> list[str]:
    """Rows for inverted files and HNSW at the recall of our buckets."""
    vectors = planted(num_rows, dimension)
    rows = []
    (summary, _), seconds = timed(lambda: joined(vectors, via="buckets", audit_rows=20_000))
    recall = summary.audit.recall or 0.0
    rows.append(f"| ours, buckets | {num_rows:,} | {recall:.3f} | {seconds:.0f} |")
    (summary, _), seconds = timed(lambda: joined(vectors, via="exact", audit_rows=1_000))
    rows.append(f"| ours, exact | {num_rows:,} | {summary.audit.recall or 0:.3f} | {seconds:.0f} |")
    single = vectors.astype(np.float32)
    lists = int(4 * num_rows**0.5)
    truth = truth_of(single)
    probes = ("nprobe", (16, 32, 64, 128, 256, 512, 1024))
    rows.append(peer(f"IVF{lists},Flat", single, truth, recall, probes))
    rows.append(peer(f"IVF{lists}_HNSW32,PQ64np,RFlat", single, truth, recall, probes))
    some = np.ascontiguousarray(single[:hnsw_rows])
    rows.append(peer("HNSW32", some, truth_of(some), recall, ("efSearch", (64, 128, 256, 512, 1024))))
    print("\n".join(rows), flush=True)
    return rows


def components(num_nodes: int, rounds: int) -> list[str]:
    """Rows for connected components of a random graph with 0.6 edges a node."""
    generator = np.random.default_rng(0)
    first, second = generator.integers(num_nodes, size=(2, num_nodes * 6 // 10))

    def hooked() -> NDArray[np.int64]:
        parent = np.arange(num_nodes)
        hang(parent, first, second)
        while not np.array_equal(above := parent[parent], parent):
            parent = above
        return parent

    with tempfile.TemporaryDirectory() as folder:
        files = LocalStore(Path(folder) / "files")
        for number, part in enumerate(np.array_split(np.arange(len(first)), 8)):
            edges = make_edges(first[part], second[part], np.full(len(part), 0.7, np.float32))
            write_edges(files, edges_key("e/", number), edges)

        def over_files() -> NDArray[np.int64]:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                store = LocalStore(work)
                return components_of_files(files, "e/", num_nodes, threshold=0.6, work=store, run=run_serially)

        ways = {
            "in memory (scipy, labels made the smallest node)": lambda: connected_components(num_nodes, first, second),
            "numpy hook and jump, as it was": hooked,
            "8 Parquet files, stars merged": over_files,
        }
        costs: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            labels = []
            for name, work in ways.items():
                label, seconds = timed(work)
                costs[name].append(seconds)
                labels.append(label)
            if number == 0:
                assert all(np.array_equal(labels[0], label) for label in labels), "the ways differ"
    return [f"| {name} | {spread(values)} |" for name, values in costs.items()]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--exact", type=int, default=100_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--peer-rows", type=int, default=1_000_000)
    parser.add_argument("--hnsw-rows", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=40_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["exact", "growth", "indexes", "components"])
    return parser.parse_args()


def main() -> None:
    """Run what was asked for and write one result file."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    asked, load = arguments(), os.getloadavg()[0]
    started = time.perf_counter()
    dimension = 256
    lines = [
        f"# Copies, {today()}",
        "",
        f"{versions()}, FAISS {faiss.__version__}, numpy {np.__version__}. Load of the machine at the beginning {load:.1f}.",
        f"Fast product here: {str(products.fast_product()[1])[6:]}. `python benchmarks/copies.py {' '.join(os.sys.argv[1:])}`",
        "",
        "Caveats: random vectors, not images; a shared machine, so CPU seconds and not time; one thread. Ours reads vectors",
        "from memory and ends in Parquet files, with the audit of its recall; FAISS ends in memory, without. On a CPU with",
        "matrix units the fast product is bfloat16, which FAISS lacks; the row in float32 is what a machine without them does.",
        "",
    ]
    if "exact" in asked.only:
        lines += exact(asked.exact, asked.rounds)
    if "growth" in asked.only:
        header = "| via | images | CPU s | us an image | edges | 0.45-0.6 | 0.6-0.7 | 0.7-0.8 | 0.8-0.9 | 0.9-1 |"
        lines += [f"## Growth: N x {dimension}, recall by similarity", "", header, "| --- " * 10 + "|"]
        lines += [*growth(asked.rows, dimension)[0], ""]
    if "indexes" in asked.only:
        lines += [f"## Against indexes at our recall: N x {dimension}, pairs from {FLOOR} on", ""]
        lines += ["| way | images | recall | CPU s (building + searching) |", "| --- | --- | --- | --- |"]
        lines += [*against_indexes(asked.peer_rows, asked.hnsw_rows, dimension), ""]
        lines += [f"Searching is timed for {TIMED_QUERIES:,} queries and scaled up.", ""]
    if "components" in asked.only:
        lines += [f"## Connected components: {asked.nodes:,} nodes, {asked.nodes * 6 // 10:,} edges", ""]
        lines += ["| way | CPU s |", "| --- | --- |", *components(asked.nodes, asked.rounds), ""]
    lines.append(f"The whole run took {(time.perf_counter() - started) / 60:.1f} minutes.")
    write_result("copies", lines, cpu_hardware())


if __name__ == "__main__":
    main()
