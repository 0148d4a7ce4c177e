"""Break the product in one place at a time, and see whether a test notices.

    python tests/mutants.py --num_mutants 240 --output_file docs/results/mutants/mutants.json

A mutant is one file with one change: an operator or a comparison for its opposite, a number for another, `not` or a
call such as `.clone()` left out, a statement skipped. Messages, annotations and docstrings are left alone. Mutants are
drawn at random, from every room as many as it has places to break; the tests of the room run until the first fails.
Everything heavy is imported once: a mutant is a fork of this process, in a copy of the checkout.
"""

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import current_process, get_context
from pathlib import Path

import pytest
from report import provenance
from tqdm.auto import tqdm


ROOT = Path(__file__).parents[1]
# The tests that are to notice, those that tell most in the least time first.
ROOMS = {
    "src/diffusers_svi/conditioning.py": ["conditioning", "wan", "chain", "pipeline"],
    "src/diffusers_svi/wan.py": ["wan", "conditioning", "pipeline"],
    "src/diffusers_svi/chain.py": ["chain", "clips", "pipeline"],
    "src/diffusers_svi/clips.py": ["clips", "pipeline"],
    "src/diffusers_svi/pixels.py": ["pixels", "chain"],
    "src/diffusers_svi/pipeline.py": ["pipeline", "parent_contract"],
    "src/diffusers_svi/clip_steps.py": ["pipeline", "directing", "resume"],
    "src/diffusers_svi/modular/denoise.py": ["modular"],
    "src/diffusers_svi/inputs.py": ["pipeline"],
    "src/diffusers_svi/lora.py": ["lora"],
    "src/diffusers_svi/lora_file.py": ["lora_file", "lora"],
    "src/diffusers_svi/lora_keys.py": ["lora_file", "lora"],
    "src/diffusers_svi/prompts.py": ["prompts"],
    "src/diffusers_svi/checks.py": ["conditioning", "pipeline"],
    "src/diffusers_svi/conditions/windows.py": ["talk", "dance"],
    "src/diffusers_svi/conditions/guidance.py": ["talk"],
    "src/diffusers_svi/conditions/talk_transformer.py": ["talk"],
    "src/diffusers_svi/conditions/dance_transformer.py": ["dance"],
    "src/diffusers_svi/conditions/converters.py": ["talk", "dance"],
    "src/diffusers_svi/conditions/condition_pipeline.py": ["talk", "dance"],
    "src/diffusers_svi/flow.py": ["flow", "scheduler"],
    "src/diffusers_svi/scheduler.py": ["scheduler"],
    "src/diffusers_svi/erft/bank.py": ["error_bank", "recycler"],
    "src/diffusers_svi/erft/storage.py": ["error_bank"],
    "src/diffusers_svi/erft/injection.py": ["recycler", "training_step"],
    "src/diffusers_svi/erft/objective.py": ["flow", "training_step"],
    "src/diffusers_svi/erft/recycler.py": ["recycler", "training_step"],
    "src/diffusers_svi/erft/snapshot.py": ["recycler"],
    "src/diffusers_svi/erft/distributed.py": ["distributed_bank"],
    "src/diffusers_svi/training/augmentation.py": ["augmentation"],
    "src/diffusers_svi/training/samples.py": ["samples"],
    "examples/train_erft.py:TrainingStep": ["training_step"],
}
OPPOSITES = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
# What every mutant would import again; never the package itself.
HEAVY = (
    "accelerate",
    "av",
    "datasets",
    "peft",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.clip.modeling_clip",
)
TIMEOUT = 300
CHECKOUTS = Path(tempfile.gettempdir()) / f"mutants-{os.getpid()}"
# What these do is not seen where nothing is on a GPU.
UNSEEN = ("cpu", "contiguous", "detach")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_mutants", type=int, default=240, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Of the choice. Default: %(default)s.")
    parser.add_argument("--rooms", nargs="*", help="Only files with one of these in their name.")
    parser.add_argument("--num_workers", type=int, default=2, help="Default: %(default)s.")
    parser.add_argument("--again", type=Path, help="Figures of an earlier run: only what lived then is tried again.")
    parser.add_argument("--output_file", type=Path, help="Figures and the mutants that lived, as JSON.")
    return parser.parse_args()


class Mutator(ast.NodeTransformer):
    """Counts the places that can be broken, and breaks the one of number `target`."""

    def __init__(self, target: int | None = None):
        self.target, self.count, self.line = target, 0, 0

    def _hit(self, node: ast.AST) -> bool:
        self.count += 1
        if self.count - 1 == self.target:
            self.line = node.lineno
            return True
        return False

    def visit_operator(self, node):
        kind = getattr(node, "op", None)
        if type(kind) in OPPOSITES and self._hit(node):
            node.op = OPPOSITES[type(kind)]()
        return self.generic_visit(node)

    visit_BinOp = visit_BoolOp = visit_AugAssign = visit_operator

    def visit_Compare(self, node):
        if type(node.ops[0]) in OPPOSITES and self._hit(node):
            node.ops[0] = OPPOSITES[type(node.ops[0])]()
        return self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.Not, ast.USub)) and self._hit(node):
            return node.operand
        return self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, (bool, int, float)) and self._hit(node):
            node.value = not node.value if isinstance(node.value, bool) else node.value + 1
        return node

    def visit_Call(self, node):
        bare = isinstance(node.func, ast.Attribute) and not node.args and not node.keywords
        if bare and node.func.attr not in UNSEEN and self._hit(node):
            return node.func.value
        return self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant):  # a docstring
            return node
        if isinstance(node.value, ast.Call) and self._hit(node):
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)

    def visit_Raise(self, node):  # what it says is not computed with
        return node

    def visit_AnnAssign(self, node):
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node):
        # Annotations are for readers, except of defaults.
        node.args.defaults = [self.visit(value) for value in node.args.defaults]
        node.args.kw_defaults = [value and self.visit(value) for value in node.args.kw_defaults]
        node.body = [self.visit(statement) for statement in node.body]
        return node


def mutate(room: str, target: int | None, checkout: Path = ROOT) -> tuple[str, Mutator]:
    """The source of a room with place `target` broken, and what did it; only within the class that the room names."""
    file, _, name = room.partition(":")
    tree, mutator = ast.parse((checkout / file).read_text()), Mutator(target)
    for node in [tree] if not name else [n for n in tree.body if getattr(n, "name", None) == name]:
        mutator.visit(node)
    return ast.unparse(ast.fix_missing_locations(tree)), mutator


def try_mutant(place: tuple[str, int]) -> tuple[str, int, int, str]:
    """Room and number of a place, its line, and what became of it: "noticed", "timeout" or "alive"."""
    room, target = place
    checkout = CHECKOUTS / str(current_process()._identity[0])
    source, mutator = mutate(room, target, checkout)
    file = checkout / room.partition(":")[0]
    original = file.read_text()
    file.write_text(source)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(checkout)
        paths = [str(checkout / folder) for folder in ("src", "examples", "benchmarks", "tests")]
        sys.path[:0] = paths
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        # `report` has imported the package from elsewhere.
        for name in [name for name in sys.modules if name.partition(".")[0] in ("diffusers_svi", "report")]:
            del sys.modules[name]
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        tests = [f"tests/test_{name}.py" for name in ROOMS[room]]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])))
    outcome, deadline = "timeout", time.time() + TIMEOUT
    while outcome == "timeout" and time.time() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            outcome = "noticed" if status else "alive"
        time.sleep(0.02)
    if outcome == "timeout":  # a test that no longer ends has noticed, too
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    file.write_text(original)
    return room, target, mutator.line, outcome


def main() -> None:
    args = parse_args()
    for module in HEAVY:
        importlib.import_module(module)
    rooms = [room for room in ROOMS if not args.rooms or any(name in room for name in args.rooms)]
    places = [(room, target) for room in rooms for target in range(mutate(room, None)[1].count)]
    chosen = random.Random(args.seed).sample(places, min(args.num_mutants, len(places)))
    outcomes: dict[str, list[str]] = {room: [] for room in rooms}
    if args.again is not None:
        # The tests have changed since, the product has not: a place is still the same place.
        before = json.loads(args.again.read_text())
        chosen = [(mutant["file"], mutant["place"]) for mutant in before["not_noticed"]]
        for room, counts in before["rooms"].items():
            outcomes[room] = [kind for kind in ("noticed", "timeout") for _ in range(counts[kind])]
    alive = []
    try:
        for worker in range(1, args.num_workers + 1):
            ignored = shutil.ignore_patterns(".*", "outputs", "build", "*cache__")
            shutil.copytree(ROOT, CHECKOUTS / str(worker), ignore=ignored)
        with get_context("fork").Pool(args.num_workers) as pool:
            for room, target, line, outcome in tqdm(pool.imap_unordered(try_mutant, chosen), total=len(chosen)):
                outcomes[room].append(outcome)
                if outcome == "alive":
                    alive.append({"file": room, "line": line, "place": target})
                    tqdm.write(f"not noticed: {room}, line {line} (place {target})")
    finally:
        shutil.rmtree(CHECKOUTS)
    total = sum(map(len, outcomes.values()))
    score = 1 - len(alive) / total
    print(f"{total - len(alive)} of {total} mutants noticed: {score:.1%}")
    if args.output_file is not None:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        kinds = ("noticed", "timeout", "alive")
        rows = {room: {kind: seen.count(kind) for kind in kinds} for room, seen in outcomes.items() if seen}
        report = {**provenance(), "seed": args.seed, "places": len(places), "mutants": total, "score": score}
        report |= {"rooms": rows, "not_noticed": alive}
        args.output_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
