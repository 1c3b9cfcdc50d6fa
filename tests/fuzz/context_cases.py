"""Two threads that enter and leave the context managers of both packages in random order.

A thread must see what it sees alone, and afterwards no switch of the process may be left on.
"""

import ast
import logging
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

import elip_kernels
import elip_models
from elip_kernels._switch import ProcessSwitch
from elip_kernels.autocast import no_autocast
from elip_models import validation
from elip_models.analysis.visualize_inputs import reduction_option_errors
from elip_models.api import budget, guidance, record_stages, reduce_
from elip_models.call_context import Guide, items, within
from elip_models.commands.image_folder import as_option_error, listing
from elip_models.commands.search import _working, search
from elip_models.embedding.demo import _shown_errors
from elip_models.engine.install import reduction_of
from elip_models.images import open_image_file
from elip_models.pretraining.data.tar_members import _tar_errors
from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.tasks.features import isolated_rng
from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.run_folder import RunFolder, as_write_error
from elip_models.profiling.measure import saved_bytes
from elip_models.rank_barrier import RankBarrier
from elip_models.recovery.distill import _only_blocks_train
from elip_models.saving.locked_folder import locked_folder
from elip_models.saving.meta_build import library_errors, quiet_logs
from elip_models.saving.open_model import missing_files_as_value_error
from elip_models.saving.saved_folder import _errors_name, _hidden_folder, saved_folder
from elip_models.towers.base import scoring_context
from elip_models.towers.wrapped_modules import unsharded
from elip_models.user_warnings import SlowScorerWarning, ignoring
from tests.fuzz.harness import Loss, kind
from tests.helpers.damage import picture
from tests.helpers.towers import WIDTH, images, plain_vit
from tests.vlm.models import build

MARK = re.compile("contextmanager$|AbstractContextManager")
CONTEXTS = {
    "use_pytorch_ops": lambda its: elip_kernels.use_pytorch_ops(),
    "export_custom_ops": lambda its: elip_kernels.export_custom_ops(),
    "guidance": lambda its: guidance(its.vit, its.text),
    "budget": lambda its: budget(its.llava, its.keep),
    "record_stages": lambda its: record_stages(its.vit),
    "guided": lambda its: reduction_of(its.vit).guided(its.text),
    "paired": lambda its: reduction_of(its.vit).paired(),
    "listing": lambda its: listing(str(its.folder)),
    "within": lambda its: within(Guide(its, its.text, its)),
    "on": lambda its: ProcessSwitch().on(),
    "reporting": lambda its: RankBarrier().reporting(),
    "quiet_logs": lambda its: quiet_logs(),
    "ignoring": lambda its: ignoring(SlowScorerWarning),
    "isolated_rng": lambda its: isolated_rng(its.text.device),
    "no_autocast": lambda its: no_autocast(its.text),
    "_tar_errors": lambda its: _tar_errors(),
    "library_errors": lambda its: library_errors("path", "a file"),
    "as_config_error": lambda its: validation.as_config_error("key"),
    "require_extra": lambda its: validation.require_extra("this"),
    "missing_files_as_value_error": lambda its: missing_files_as_value_error("model", "name"),
    "as_option_error": lambda its: as_option_error(search),
    "reduction_option_errors": lambda its: reduction_option_errors(),
    "as_write_error": lambda its: as_write_error(its.folder),
    "_shown_errors": lambda its: _shown_errors(),
    "_working": lambda its: _working("searching"),
    "scoring_context": lambda its: scoring_context(its.vit, its.text),
    "unsharded": lambda its: unsharded(its.own.blocks[0]),
    "saved_bytes": lambda its: saved_bytes(),
    "open_image_file": lambda its: open_image_file(its.folder / "image.png", "image"),
    "saved_folder": lambda its: saved_folder(its.folder / "saved"),
    "_hidden_folder": lambda its: _hidden_folder(its.folder, ".saving-"),
    "_errors_name": lambda its: _errors_name(its.folder),
    "locked_folder": lambda its: locked_folder(its.folder / "locked", "folder", marker="marker"),
    "locked": lambda its: its.run.locked(its.config, resume=False),
    "eval_mode": lambda its: eval_mode(its.own),
    "_only_blocks_train": lambda its: _only_blocks_train(its.own),
}
"""Name -> the context manager of a thread, by what is its own."""
OTHERS = {
    "kernels_on_cpu": "is for the whole process, in tests",
    "launchers_on_cpu": "is for the whole process, in tests",
    "upload_folder": "a process has one page",
    "connected": "a process has one connection to Ray",
    "_mistakes_undone": "a folder has one run, which locks it",
    "evaluation_model": "a process has one run",
    "expected_warnings_ignored": "a process has one run",
    "in_mode": "a benchmark times one model at a time",
    "_adapters": "replaces layers of the model that it trains",
    "accumulate": "a process has one run",
    "device_guard": "of a GPU",
    "recomputing": "is entered by a recomputation alone",
    "tracing": "torch.jit and ONNX trace in one thread at a time",
    "_isolated_rng": "is entered by scoring_context",
}
"""Name -> why it is not entered by two threads."""


def context_managers():
    """Names of all functions of both packages that return a context manager."""
    names = set()
    for package in (elip_kernels, elip_models):
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    marks = map(ast.unparse, (*node.decorator_list, *filter(None, [node.returns])))
                    names |= {node.name for mark in marks if MARK.match(mark)}
    return names


class Thread:
    """A thread, what is its own, and what it does: enter a context, leave the last one, or run."""

    def __init__(self, number, folder, rng, names):
        self.vit, self.llava, self.inputs = SHARED
        self.folder = folder / str(number)
        self.folder.mkdir()
        (self.folder / "image.png").write_bytes(picture())
        self.text, self.keep = 4 * torch.randn(2, WIDTH), rng.choice((2, 3, 0.3))
        self.own, self.pixels = plain_vit(depth=2), images()
        self.config = load_recipe("clip_tiny", [f"output_dir={self.folder / 'run'}"])
        self.run = RunFolder(self.folder / "run")
        self.steps, depth = [], 0
        for _ in range(rng.randrange(4, 12)):
            step = rng.choice(("run", "leave", *names))
            if step in self.steps or (step == "leave" and not depth):
                step = "run"
            depth += {"run": 0, "leave": -1}.get(step, 1)
            self.steps.append(step)
        self.steps += ["run", *["leave"] * depth, "run"]

    def begin(self):
        """Return the steps as functions; "run" returns outputs."""
        left = []

        def do(step):
            if step == "run":
                with torch.no_grad():
                    return self.vit(self.pixels), self.llava(**self.inputs).logits
            if step == "leave":
                left.pop().__exit__(None, None, None)
            else:
                context = CONTEXTS[step](self)
                context.__enter__()
                left.append(context)
            return None

        return [lambda step=step: do(step) for step in self.steps]


def alternately(threads, rng):
    """Run the steps of threads, each in its own, one at a time in random order."""
    left = [thread.begin() for thread in threads]
    results = [[] for _ in threads]
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in threads]
        while any(left):
            i = rng.choice([i for i, steps in enumerate(left) if steps])
            results[i].append(pools[i].submit(left[i].pop(0)).result())
    return results


def at_once(threads):
    """Run the steps of threads at the same time."""
    with ThreadPoolExecutor(len(threads)) as pool:
        return list(pool.map(lambda thread: [step() for step in thread.begin()], threads))


class Reduces(torch.nn.Module):
    def forward(self, tokens):
        return elip_kernels.reduce(tokens, tokens[:, 1:, 0], 3)


def captured_ops():
    """Whether a trace has our op, outside and inside of `export_custom_ops`."""

    def has_op():
        with torch.no_grad():
            return "elip::" in str(torch.jit.trace(Reduces(), torch.ones(2, 6, 4)).graph)

    with elip_kernels.export_custom_ops():
        inside = has_op()
    return has_op(), inside


def switches(threads):
    """What a context manager must leave as it was, for this process and for its models."""
    owned = [thread.own for thread in threads]
    return {
        "ops": captured_ops(),
        "logging": logging.root.manager.disable,
        "warnings": [*warnings.filters],
        "environment": dict(os.environ),
        "modes": [module.training for own in owned for module in own.modules()],
        "gradients": [p.requires_grad for own in owned for p in own.parameters()],
        "guides": items(Guide),
        "gradient mode": torch.is_grad_enabled(),
    }


SHARED = []
"""The models that all cases share, made once."""


def make_models(folder):
    missing = context_managers() ^ {*CONTEXTS, *OTHERS}
    assert not missing, f"expected each context manager in CONTEXTS or OTHERS, got {missing}"
    torch.manual_seed(0)
    vit = reduce_(plain_vit(depth=4).eval(), "elip", keep=0.7, fusion=0.2)
    llava, inputs = build("llava")
    SHARED.extend((vit, reduce_(llava, "diverse", keep=0.5), inputs))


@kind(share=1, prepare=make_models, seconds=60)
def threads_in_contexts(folder, rng, prepared):
    torch.manual_seed(rng.randrange(2**31))
    names = rng.sample(sorted(CONTEXTS), 3)  # few, so that threads meet in one
    threads = [Thread(number, folder, rng, names) for number in range(2)]
    alone = [at_once([thread])[0] for thread in threads]
    before = switches(threads)
    together = alternately(threads, rng) if rng.random() < 0.8 else at_once(threads)
    words = " and ".join(", ".join(thread.steps) for thread in threads)
    for expected, got in zip(alone, together, strict=True):
        pairs = zip(expected, got, strict=True)
        if not all(a is None or all(map(torch.equal, a, b)) for a, b in pairs):
            raise Loss(f"other outputs than those of one thread: {words}")
    after = switches(threads)
    if left := [name for name in before if before[name] != after[name]]:
        raise Loss(f"{left} are left on: {words}")
    return "read"
