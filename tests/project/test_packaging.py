"""What a user installs: imports that are light, extras that are named, types, wheel and sdist."""

import ast
import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

import elip_kernels
import elip_models
from elip_models.validation import install_command

ROOT = Path(__file__).parents[2]
IMPORTS_EACH = """
import importlib, pkgutil, sys
import torch
import elip_kernels, elip_models
from elip_models.validation import EXTRAS

hidden = EXTRAS.keys() - {"numpy"}  # which torch has imported, where it is
sys.modules.update(dict.fromkeys(hidden))
for package in (elip_kernels, elip_models):
    for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".", str):
        try:
            importlib.import_module(name)
            print(f"{name}: works")
        except (ImportError, SystemExit) as error:
            print(f"{name}: {error}")
for name in elip_models.__all__:
    try:
        getattr(elip_models, name)
        print(f"elip_models.{name}: works")
    except ImportError as error:
        print(f"elip_models.{name}: {error}")
"""
NEEDS = {
    "elip_models.analysis": "train",
    "elip_models.calibration": "train",
    "elip_models.pretraining.checkpoints": "models",
    "elip_models.create_model": "models",
    "elip_models.pretraining.data": "train",
    "elip_models.embed": "embed",
    "elip_models.embedding": "embed",
    "elip_models.load_reduced": "models",
    "elip_models.pretraining.models": "models",
    "elip_models.profiling": "train",
    "elip_models.save_reduced": "models",
    "elip_models.pretraining.training": "train",
}
"""Of the rooms and names that do not work with torch alone, the extra that their error names."""


def run(*command, cwd=ROOT, path=ROOT):
    """The process of a command, its modules searched in `path` first; it has to succeed."""
    env = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def check_imports(path=ROOT, cwd=ROOT):
    """With torch alone every module works or names its extra, and the command does."""
    done = run(sys.executable, "-c", IMPORTS_EACH, path=path, cwd=cwd)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    libraries = ("eva", "hf", "hf_heads", "hf_image_text", "hf_processor", "open_clip", "timm")
    for adapter in (*libraries, "timm_bias", "timm_naflex"):  # as_tower names their extra
        del said[f"elip_models.towers.{adapter}"]
    for name in ("elip_models.__main__", "elip_models.cli"):
        del said[name]
    assert "elip needs the train extra: pip install 'elip-kernels[train]'" in done.stderr
    broken = {name: text for name, text in said.items() if text != "works"}
    for text in broken.values():
        assert re.search(r" needs [\w.]+: pip install 'elip-kernels\[[a-z-]+\]'$", text), text
    for name, needed in NEEDS.items():
        assert broken[name].endswith(f"[{needed}]'"), broken[name]
    assert "elip_models.reduce_" not in broken and "elip_kernels.reduce" not in broken


def test_a_package_lists_what_is_public():
    for package in (elip_kernels, elip_models):
        assert dir(package) == sorted(package.__all__)


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "elip_kernels.__version__"
    assert elip_models.__version__ == elip_kernels.__version__


BUILDS_EDITABLE = "import setuptools.build_meta as b, sys; b.build_editable(sys.argv[1])"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of this tree, in which nothing lies about, and what is built of it."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for package in ("elip_kernels", "elip_models"):
        shutil.copytree(
            ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, cwd=tree)
    editable = dist / "editable"
    editable.mkdir()
    run(sys.executable, "-c", BUILDS_EDITABLE, editable, cwd=tree)
    return dist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """installed("wheel" or "editable") -> a virtual environment with it, and all packages of this
    one."""

    def install(kind):
        (file,) = built.glob({"wheel": "*.whl", "editable": "editable/*.whl"}[kind])
        environment = tmp_path_factory.mktemp(kind)
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        own = site_packages(environment)
        (own / "z.pth").write_text(sysconfig.get_path("purelib") + "\n")
        zipfile.ZipFile(file).extractall(own)
        return environment

    return cache(install)


def site_packages(environment):
    """Where the packages of a virtual environment lie."""
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


@pytest.mark.slow
def test_twine_accepts_wheel_and_sdist(built):
    files = [path for path in built.iterdir() if path.is_file()]
    version = elip_kernels.__version__
    assert {path.name for path in files} == {
        f"elip_kernels-{version}-py3-none-any.whl",
        f"elip_kernels-{version}.tar.gz",
    }
    run(sys.executable, "-m", "twine", "check", "--strict", *files)


@pytest.mark.slow
def test_the_wheel_has_what_it_needs_and_nothing_else(built):
    (file,) = built.glob("*.whl")
    found = {name for name in zipfile.ZipFile(file).namelist() if ".dist-info/" not in name}
    packages = [ROOT / "elip_kernels", ROOT / "elip_models"]
    files = [path for package in packages for path in package.rglob("*") if path.is_file()]
    kept = {path for path in files if path.suffix in (".py", ".yaml", ".typed", ".j2")}
    assert found == {str(path.relative_to(ROOT)) for path in kept}


@pytest.mark.slow
def test_the_wheel_has_the_metadata_of_a_package_index(built):
    (file,) = built.glob("*.whl")
    wheel = zipfile.ZipFile(file)
    (name,) = (each for each in wheel.namelist() if each.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Author"] and metadata["License-Expression"] == "Apache-2.0"
    assert not any("License" in each for each in metadata.get_all("Classifier"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "docs/strategies.md)" in metadata.get_payload(decode=True).decode()


def test_an_extra_is_installed_from_the_checkout_that_runs():
    assert shlex.split(install_command("train")) == ["pip", "install", "-e", f"{ROOT}[train]"]


@pytest.mark.slow
def test_imports_of_the_wheel_work_or_name_their_extra(installed):
    environment = installed("wheel")
    check_imports(path=site_packages(environment), cwd=environment)


def is_typed(function):
    """All arguments and the result have hints; a kernel of Triton takes none."""
    decorators = [ast.unparse(each).partition("(")[0] for each in function.decorator_list]
    if not {"triton.jit", "kernel"}.isdisjoint(decorators):
        return True
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    hints = [each.annotation for each in given if each.arg not in ("self", "cls")]
    return None not in (*hints, function.returns)


def test_every_public_function_is_typed():
    for package in ("elip_kernels", "elip_models"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            functions = [each for each in nodes if isinstance(each, ast.FunctionDef)]
            public = [each for each in functions if not each.name.startswith("_")]
            assert [each.name for each in public if not is_typed(each)] == [], path


@pytest.mark.slow
def test_the_typed_script_runs():
    run(sys.executable, ROOT / "tests" / "helpers" / "typed_user_script.py")
