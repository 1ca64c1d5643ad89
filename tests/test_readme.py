"""What the documents promise: their code runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import os
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from click.testing import CliRunner
from ranks import start_fork_server

from lgc_lab.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def document_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def be_rank(rank: int, script: Path, port: int, world_size: int) -> None:
    """Run a script in its folder as one of the ranks that torchrun could have started; rank 0's output is kept."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    launched["MASTER_PORT"] = port
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    os.chdir(script.parent)
    with Path(f"output-{rank}").open("w") as output, redirect_stdout(output):
        runpy.run_path(script.name, run_name="__main__")


def run_forked(script: str, folder: Path, world_size: int = 2) -> str:
    """What it prints on its ranks, as torchrun would start them, but forked with torch imported."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(script)
    start_fork_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (folder / "script.py", store.port, world_size)
    mp.start_processes(be_rank, arguments, nprocs=world_size, start_method="forkserver")
    return (folder / "output-0").read_text().strip()


def test_the_script_of_the_readme_trains(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    output = run_forked(script, tmp_path)
    printed = re.fullmatch(r"loss (.*), (.*) times fewer bytes per compressed step", output)
    assert printed, output
    assert float(printed[1]) < 0.2  # of three classes, log(3) = 1.1 before training
    assert float(printed[2]) > 10


def test_the_script_of_the_guide_goes_on_after_a_damaged_checkpoint_and_a_kill(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "usage.md").read_text()
    (script,) = (text for text in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "init_process_group" in text)
    whole = run_forked(script, tmp_path / "whole")
    assert whole.startswith("steps 0 to 200")
    die = "    if step == 160:\n        import os; os._exit(1)\n    optimizer.zero_grad()\n"
    with pytest.raises(mp.ProcessExitedException):
        run_forked(script.replace("    optimizer.zero_grad()\n", die), tmp_path / "killed")
    assert (tmp_path / "killed" / "output-0").read_text() == ""
    (tmp_path / "killed" / "checkpoints" / "step-0000000150" / "rank-0001.safetensors").write_bytes(b"damaged")
    resumed = run_forked(script, tmp_path / "killed")
    assert resumed == whole.replace("steps 0", "steps 100")


SAME_ON_ALL_RANKS = """
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
of_rank_0 = weights.clone()
dist.broadcast(of_rank_0, 0)
assert torch.equal(weights, of_rank_0) and bool(weights.isfinite().all())
"""


def test_the_examples_of_loops_leave_the_same_model_on_every_rank(tmp_path: Path) -> None:
    beginning, *examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loops.md").read_text(), re.DOTALL)
    run_forked("".join([beginning, *(example + SAME_ON_ALL_RANKS for example in examples)]), tmp_path)


def test_the_scripts_of_sites_train_and_go_on_with_another_number_of_sites(tmp_path: Path) -> None:
    _, ddp, fsdp, saving, going_on = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "sites.md").read_text(), re.DOTALL
    )
    begin, end = 'dist.init_process_group("gloo")\n', "dist.destroy_process_group()"
    both = ddp.replace(end, "") + fsdp.replace(begin, "").replace(end, saving + end)
    first, second = run_forked(both, tmp_path, 4).splitlines()
    printed = re.fullmatch(r"loss (.*), (.*) bytes between the sites, (.*) inside", first)
    assert printed, first
    assert float(printed[1]) < 0.5  # of three classes, log(3) = 1.1 before training
    assert 0 < int(printed[2]) < int(printed[3])
    assert second.startswith("steps 0 to 50")
    assert run_forked(fsdp, tmp_path, 2).startswith("steps 50 to 100")
    imports = saving[: saving.index("with")]
    one_rank_a_site = fsdp[: fsdp.index("handle = ")].replace("// 2", "// 1").replace("(sites, 2)", "(sites, 1)")
    on_other_ranks = one_rank_a_site + imports + going_on + "print(handle.step)\n" + end
    assert run_forked(on_other_ranks, tmp_path, 2) == "50"


def test_the_script_of_machines_that_differ_trains_and_goes_on(tmp_path: Path) -> None:
    script = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "elastic.md").read_text(), re.DOTALL)[1]
    short = script.replace("TOTAL = 200", "TOTAL = 60").replace("Seconds(0.1)", "Seconds(0.02)")
    for begun in (0, 60):
        printed = re.fullmatch(r"steps (\d+) to (\d+), (\d+) samples, accuracy (.*)", run_forked(short, tmp_path))
        assert printed
        assert begun <= int(printed[1]) < 60 + begun <= int(printed[2])
        short = short.replace("TOTAL = 60", "TOTAL = 120")


def test_the_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_index_lists_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [path.name for path in DOCUMENTS if f"{path.name}](" not in index and path.name != "README.md"] == []


def anchors(document: Path) -> list[str]:
    """Targets within a document, as GitHub derives them from its headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_links_within_the_project_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https://)([^)#]*)#?([^)]*)\)", document.read_text()):
        linked = document.parent / target if target else document
        assert linked.exists(), target
        assert not anchor or anchors(linked).count(anchor) == 1, f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_files_and_tests_that_the_documents_name_exist(document: Path) -> None:
    text = document.read_text()
    for path in re.findall(r"`((?:src|tests|tools)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for file, test in re.findall(r"`(test_\w+): (\w+?)(?:_?\.\.\.)?`", text):
        assert f"def test_{test}" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file}: {test}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_commands_in_the_documents_have_arguments_that_exist(document: Path) -> None:
    benches = "link|round|sites|stragglers|elastic|codec"
    pattern = rf"lgc (train|compare|report|analyze|plan|bench (?:{benches}))((?: [^`\n\\]+|\\\n)*)"
    for command, arguments in re.findall(pattern, document.read_text()):
        help_text = CliRunner().invoke(main, [*command.split(), "--help"]).output
        for option in re.findall(r"--[a-z0-9-]+", arguments):
            assert f"{option} " in help_text, f"lgc {command} {option}"
