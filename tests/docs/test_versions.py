"""The ranges that setup.cfg declares are those of the versions that the tests run with. CPU, no network."""

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[2]
OLDEST = "constraints-oldest.txt"
CONSTRAINTS = sorted(path.name for path in ROOT.glob("constraints*.txt"))


def requirements_of(*extras):
    """The requirements of the package and of these extras that name a version."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    found = [Requirement(line) for text in texts for line in text.split("\n") if line]
    return [requirement for requirement in found if requirement.specifier]


def pinned_in(name):
    """The versions that a file of constraints pins, by the packages' names."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


def lower_bound(requirement):
    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return bound


@pytest.mark.parametrize("requirement", requirements_of("deepspeed"), ids=lambda requirement: requirement.name)
def test_a_lower_bound_is_the_oldest_version_that_the_tests_run_with(requirement):
    assert Version(lower_bound(requirement)) == Version(pinned_in(OLDEST)[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_tests_run_with_versions_of_the_declared_ranges(name):
    pinned = pinned_in(name)
    assert {canonicalize_name(requirement.name) for requirement in requirements_of()} <= set(pinned)
    outside = [
        f"{requirement}, {version} there"
        for requirement in requirements_of("deepspeed")
        if (version := pinned.get(canonicalize_name(requirement.name))) and version not in requirement.specifier
    ]
    assert outside == []


def test_the_files_of_constraints_are_found():
    assert {OLDEST, "constraints.txt"} <= set(CONSTRAINTS)
    assert {"torch", "transformers", "peft", "trl"} <= {requirement.name for requirement in requirements_of()}
