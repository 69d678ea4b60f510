"""The documents say what is there: files, links, options, commands, data and configuration."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from mst import cli, hookspecs
from mst.cli.options import Parser, refuse_unknown, train_request
from mst.cli.plan import asks_for_longest
from mst.data import formats
from mst.errors import UsageError
from mst.model.facts import read_facts
from mst.planner import plan
from mst.probe import backend_environment, machine_facts, select_device
from mst.registry import load
from mst.request import TASKS, TrainRequest
from mst.resume import CHANGEABLE_ON_RESUME
from mst.seal.audit.command import add_option
from mst.workload import DataFacts

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = tuple(
    str(path.relative_to(ROOT))
    for path in sorted(
        [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")]
    )
    if "node_modules" not in path.parts
)
CHINESE = tuple(
    each for each in DOCUMENTS if each.endswith(".zh-CN.md") and each.startswith("docs/")
)
# Each code folder, and which of its files the tree must have.
TREE_FILES = (
    "core/**/*.py", "backends/**/*.py", "plugins/**/*.py", "benchmarks/**/*.py",
    "ci/*", "docs/*.md", "docs/deploy/*",
)  # fmt: skip


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Return the fenced blocks of one language, indented ones too."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```$", text_of(document), re.DOTALL | re.MULTILINE
    )
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def fences(document: str) -> list[tuple[str, str]]:
    """Return language and text of every fenced block, in order."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text_of(document), re.DOTALL | re.MULTILINE)


def command_lines(document: str) -> list[str]:
    """Return every command in the document's shell blocks."""
    lines = [line.strip() for block in blocks(document, "bash") for line in block.splitlines()]
    return [
        part.strip()
        for line in lines
        if line and not line.startswith("#")
        for part in line.split("&&")
    ]


def mst_commands() -> list[str]:
    """Return the `mst …` commands of all documents, each once."""
    found = []
    for document in DOCUMENTS:
        for line in command_lines(document):
            if re.match(r"(\.venv/bin/)?mst( |$)", line):
                found.append(line.removeprefix(".venv/bin/"))
    return list(dict.fromkeys(found))


def tree(document: str) -> list[str]:
    """Return the paths that a README's file tree has."""
    body = text_of(document).split("<!-- tree:begin -->")[1].split("<!-- tree:end -->")[0]
    return [line.split()[0] for line in body.splitlines() if line.strip() and "```" not in line]


def parsed(command: str) -> tuple[str, argparse.Namespace]:
    """Parse a command line with the parser that runs it; raises UsageError as it would."""
    _, name, *arguments = shlex.split(command)
    name = "train" if name in TASKS else cli.ALIASES.get(name, name)
    module = importlib.import_module(f"mst.cli.{cli.COMMANDS[name][0]}")
    parser = Parser(prog=f"mst {name}", allow_abbrev=False)
    module.add_arguments(parser)
    add_option(name, parser)
    args, unknown = parser.parse_known_args(arguments)
    refuse_unknown(parser, unknown)
    return name, args


@pytest.fixture
def documented_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a directory with the files that the README tells its reader to save."""
    (tmp_path / "records.jsonl").write_text(blocks("README.md", "jsonl")[0], encoding="utf-8")
    (tmp_path / "tune.yaml").write_text(blocks("README.md", "yaml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", READMES)
def test_the_file_tree_lists_the_files_that_exist(document: str) -> None:
    there = {
        str(path.relative_to(ROOT))
        for pattern in TREE_FILES
        for path in ROOT.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    there |= {
        f"{path.parent.relative_to(ROOT)}/"
        for path in ROOT.glob("tests/**/*.py")
        if "vendor" not in path.parts
    }
    listed = tree(document)
    roots = ("core/", "backends/", "plugins/", "benchmarks/", "ci/", "docs/", "tests/")
    in_roots = {path for path in listed if path.startswith(roots)}

    assert len(listed) == len(set(listed))
    assert there - in_roots == set()
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_both_readmes_have_the_same_tree_and_the_same_commands() -> None:
    assert tree(READMES[0]) == tree(READMES[1])
    assert command_lines(READMES[0]) == command_lines(READMES[1])
    assert blocks(READMES[0], "yaml") == blocks(READMES[1], "yaml")


def test_both_readmes_give_the_same_demo_figures() -> None:
    def figures(document: str) -> list[str]:
        block = re.search(r"demo-figures:begin -->(.*?)<!-- demo", text_of(document), re.DOTALL)

        assert block is not None
        return sorted(re.findall(r"\d[\d.,-]*\d|\d", block[1]))

    assert figures(READMES[0]) == figures(READMES[1])


@pytest.mark.parametrize("document", CHINESE)
def test_a_document_in_chinese_has_the_blocks_of_the_english_one(document: str) -> None:
    english = document.replace(".zh-CN", "")
    found, wanted = fences(document), fences(english)

    assert found == wanted
    assert f"[English]({Path(english).name})" in text_of(document)
    assert f"[中文]({Path(document).name})" in text_of(english)


@pytest.mark.parametrize("document", CHINESE)
def test_a_document_in_chinese_has_no_figure_that_the_english_one_has_not(document: str) -> None:
    def figures(text: str) -> set[str]:
        # 2.8 亿 is 280 million in English, and 7 月 is July.
        plain = re.sub(r"\d[\d.,]* ?[万亿月]", "", text)
        return set(re.findall(r"\d[\d.,]*\d|\d", plain))

    english = document.replace(".zh-CN", "")

    assert figures(text_of(document)) - figures(text_of(english)) == set()


@pytest.mark.parametrize("document", CHINESE)
def test_a_document_in_chinese_leads_to_chinese_ones(document: str) -> None:
    here = (ROOT / document).parent
    targets = re.findall(r"\]\(([\w./-]+)\.md\)", text_of(document))
    english = {each for each in targets if not each.endswith(".zh-CN")}
    own = Path(document).name.removesuffix(".zh-CN.md")

    assert [each for each in english - {own} if (here / f"{each}.zh-CN.md").exists()] == []
    assert re.findall(r"\S*zh-CN\.md\S*\)（?，?英文", text_of(document)) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_resolve(document: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(document))
    local = [each.split("#")[0] for each in targets if not re.match(r"[a-z]+:|#", each)]
    here = (ROOT / document).parent

    assert [each for each in local if not (here / each).exists()] == []


@pytest.mark.parametrize("name", ["options", "hooks"])
def test_a_generated_document_is_fresh(name: str) -> None:
    command = f"ci/make_{name}_doc.py"
    spec = importlib.util.spec_from_file_location(f"{name}_doc", ROOT / command)

    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    assert text_of(f"docs/{name}.md") == module.document(), f"run: python {command}"


def test_every_hook_is_in_the_reference_with_what_a_vendor_has_to_know() -> None:
    _, *entries = re.split(r"^### ", text_of("docs/hooks.md"), flags=re.MULTILINE)
    specified = {name for name in vars(hookspecs) if name.startswith("mst_")}

    assert {each.split()[0] for each in entries} == specified
    for each in entries:
        for part in ("**Called:**", "**Returns:**", "**If it raises:**", "```python", "Added in "):
            assert part in each


def test_what_resume_may_change_is_documented() -> None:
    part = text_of("docs/run-directory.md").split("<!-- changeable:")[1]

    assert set(re.findall(r"`(\w+)`", part)) == CHANGEABLE_ON_RESUME


@pytest.mark.parametrize("command", mst_commands())
def test_a_documented_command_parses(command: str, documented_files: Path) -> None:
    name, args = parsed(command)
    if name == "plan":
        asks_for_longest(args)
    if name in ("train", "plan"):
        assert isinstance(train_request(args), TrainRequest)


def test_a_wrong_flag_in_a_document_would_fail() -> None:
    with pytest.raises(UsageError, match="unknown option --lora-ranks"):
        parsed("mst train --lora-ranks 8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_named_in_the_text_exist(document: str) -> None:
    plain = re.sub(r"```.*?```", "", text_of(document), flags=re.DOTALL)
    named = set(re.findall(r"`mst ([a-z]+(?:-[a-z]+)*)", plain))

    assert named - {*cli.COMMANDS, *cli.ALIASES, *TASKS} == set()


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = cli.main([*command.split(), "--help"])
    except SystemExit as leaving:
        code = leaving.code

    assert code == 0
    assert f"usage: mst {command}".strip() in capsys.readouterr().out


@pytest.mark.parametrize("document", [*READMES, "docs/data.md"])
def test_the_example_rows_are_read(document: str, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(document, "jsonl")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block, encoding="utf-8")

        assert len(formats.read([str(path)]).rows) == len(block.splitlines())


def test_the_readmes_yaml_and_rows_are_planned(
    documented_files: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["plan", "tune.yaml", "--model", str(tiny_model), "--device", "cpu", "--json"])
    answer = json.loads(capsys.readouterr().out)

    assert code == 0
    assert answer["plan"]["train_rows"] == 2
    assert answer["plan"]["val_rows"] == 1


def test_the_readmes_data_option_is_planned(
    documented_files: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["plan", "--dataset", "records.jsonl", "--model", str(tiny_model)])
    out = capsys.readouterr().out

    assert code == 0
    assert "3 rows, jsonl, messages" in " ".join(out.split())


@pytest.mark.parametrize("command", ["devices", "plugins", "devices --json", "plugins --json"])
def test_commands_that_only_look_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 0
    assert "cpu" in capsys.readouterr().out


def test_the_documented_backend_is_loaded_and_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    (tmp_path / "mst_mychip.py").write_text(blocks("docs/plugins.md", "python")[0], "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = load([EntryPoint("mychip", "mst_mychip", "mst")])
    module = importlib.import_module("mst_mychip")
    monkeypatch.setattr(module, "NODES", tmp_path)
    nothing = machine_facts(registry).backends[0].probe
    for node in ("mychip0", "mychip1"):
        (tmp_path / node).touch()
    backend, device, capabilities = select_device(machine_facts(registry), "mychip:1")
    environment = backend_environment(registry, backend.name, (device,))
    data = DataFacts((16,) * 8, (4,) * 8, 0, None, 16, 16, 0)
    made = plan(
        backend.name, (device,), (capabilities,), environment, read_facts(tiny_model), data,
        TrainRequest(device="mychip:1"),
    )  # fmt: skip

    assert [record.status for record in registry.records] == ["ok"]
    assert not nothing.found
    assert nothing.reason == "no /dev/mychip*: load the driver"
    assert made.torch_devices == ("mychip:0",)
    assert made.environment == {"MYCHIP_VISIBLE_DEVICES": "1"}
    assert set(device.sources) >= {"memory_total_bytes", "memory_free_bytes"}
