"""What is published: the README on the package index, the citation, versions that agree, and what goes into the files."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import yaml

from sparsify.version import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def loaded(name):
    """A script of the root or of release/, not run."""
    spec = importlib.util.spec_from_file_location(Path(name).stem + "_script", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_links_of_the_readme_work_on_the_package_index():
    readme, setup = (ROOT / "README.md").read_text(encoding="utf-8"), loaded("setup.py")
    assert any(link.startswith("docs/") for link in links(readme))
    for repository in ("", "https://example.org/sparsify/"):
        text = setup.for_the_index(readme, repository)
        assert all(link.startswith(("https://", "#")) for link in links(text))
        assert len(links(text)) == (len(links(readme)) if repository else len(links(readme)) - relative(readme))
    assert "[security](https://example.org/sparsify/blob/main/docs/security.md)" in text
    assert re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text) == re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", readme)


def relative(text):
    return sum(not link.startswith(("https://", "#")) for link in links(text))


def test_relative_links_of_the_readme_lead_to_files():
    for link in links((ROOT / "README.md").read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / link.partition("#")[0]).is_file(), link


def test_version_and_licence_are_the_same_everywhere():
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert about["version"] == PROJECT["version"] == __version__ and about["license"] == PROJECT["license"]
    assert about["cff-version"] == "1.2.0" and "Sparsifiner" in about["references"][0]["title"]


def test_the_workflow_runs_targets_that_exist_on_the_pythons_that_are_claimed():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for job in jobs.values():
        for step in job["steps"]:
            assert step.get("run", "make lint").removeprefix("make ") in targets, step
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == named


def test_every_file_of_the_repository_is_in_the_source_distribution():
    """By the lines of MANIFEST.in, and the packages that setuptools takes anyway."""
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if known.returncode:
        return  # an unpacked source distribution
    patterns = []
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        command, *words = line.split()
        if command == "include":
            patterns += [re.escape(word).replace(r"\*", "[^/]*") for word in words]
        else:
            patterns += [f"{re.escape(words[0])}/.*" + re.escape(word).replace(r"\*", "[^/]*") for word in words[1:]]
    taken = re.compile(
        "|".join([*patterns, "sparsify/.*", "pyproject.toml", "setup.py", "LICENSE", "NOTICE", "MANIFEST.in"])
    )
    left = [name for name in known.stdout.splitlines() if not taken.fullmatch(name)]
    assert left == [".gitignore"]
