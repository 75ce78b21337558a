"""The rules of the house: import order, citations, flags, headers, demos; and every symbol and command in README is real."""
import ast
import importlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time

import pytest

import tokenizer
from conftest import FILES, ROOT, run_train

README = (ROOT / "README.md").read_text()
PACKAGES = {"torch", "numpy", "regex", "tiktoken", "triton"}
PEERS = {"liger_kernel", "fla"}               # timed beside where they are installed, never needed


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_files_to_its_left(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in (m.split(".")[0] for m in modules):
            if module in FILES:
                assert FILES.index(module) < FILES.index(name), f"{name}.py:{node.lineno} imports {module}"
            else:
                assert module in PACKAGES | PEERS or module in sys.stdlib_module_names, f"{name}.py:{node.lineno} imports {module}"


def test_the_top_level_holds_the_house_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {f.split("/")[0] for f in tracked} <= {f"{n}.py" for n in FILES} | {"tests", "README.md", "LICENSE", ".gitignore", ".ci"}


@pytest.mark.parametrize("name", FILES)
def test_the_first_forty_lines_tell_what_why_and_how(name):
    source = (ROOT / f"{name}.py").read_text()
    head = ast.get_docstring(ast.parse(source))
    assert head.count("\n") < 40 and source.startswith('"""')
    for part in ("Contents:", "References:", f"python {name}.py"):
        assert part in head, part
    assert len(re.findall(r"=|argmax|->|\|", head)) > 3          # there are equations or a picture
    sections = re.findall(r"^# ---- (.+?) ----$", source, re.M)
    contents = re.search(r"Contents:\s+(.+?)\n[A-Z]\w+:", head, re.S)[1]
    assert len(re.split(r"\s*\|\s*", contents.strip())) in range(len(sections) - 1, len(sections) + 3), (contents, sections)


@pytest.mark.parametrize("name", FILES)
def test_every_citation_key_is_listed(name):
    source = (ROOT / f"{name}.py").read_text()
    listed = set(re.findall(r"\[(\w+)\]", ast.get_docstring(ast.parse(source)).partition("References:")[2]))
    used = set(re.findall(r"\[([A-Z]\w+) (?:eq|sec|alg|app)\b", source)) | set(re.findall(r", ([A-Z]\w+) eq", source))
    assert used <= listed, used - listed
    used |= set(re.findall(r"\[([A-Z]\w+)[],]", source.split('"""', 2)[2]))            # a whole paper
    assert listed <= used | set(re.findall(r"\[([A-Z]\w+),", source)), f"listed and never cited: {listed - used}"


@pytest.mark.parametrize("name", FILES)
def test_every_flag_has_a_type_and_a_help_text(name):
    fields, choices = tokenizer.read_config(ROOT / f"{name}.py")
    for field, (default, comment, _, _) in fields.items():
        assert comment and type(default) in tokenizer.READ_AS, field
        assert field not in choices or default in choices[field] or default == "", f"--{field}: {default!r} is not one of {choices[field]}"


def test_flags_of_the_design_are_there():
    import train
    fixed = ("input out_dir preset steps tokens_per_step micro_batch seq_len vocab_size n_layer n_embd n_head n_kv_head d_ff attn moe norm act pos lr "
             "optimizer schedule objective seed device dtype compile kernels eval_every save_every resume init_from overwrite plan sample dp").split()
    assert set(fixed) <= set(train.TrainConfig.__dataclass_fields__)
    read = {field for name in FILES for field in tokenizer.read_config(ROOT / f"{name}.py")[0]}
    assert read == set(train.TrainConfig.__dataclass_fields__)   # what the source says is what the class has


@pytest.mark.parametrize("name", FILES[:-1])
def test_every_file_shows_its_idea_in_under_ten_seconds(name):
    start = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / f"{name}.py"], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="2"))
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 4, done.stderr
    assert not done.stderr and time.monotonic() - start < 60     # ten on a quiet machine


# ---- README ----

ROWS = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in README.splitlines() if re.match(r"\| [\w`]", line)]
CONCEPTS = [row for row in ROWS if len(row) == 5 and re.match(r"`\w+\.py:", row[1])]
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip() and not line.startswith("#")]
QUICK = [line.split("  #")[0].strip() for line in README.splitlines() if line.endswith("# quick")]


def test_readme_has_a_map():
    assert len(CONCEPTS) >= 25 and len(COMMANDS) >= 12 and len(QUICK) >= 5


@pytest.mark.parametrize("row", CONCEPTS, ids=lambda row: row[0])
def test_concept_row_is_real(row):
    _, where, _, flag, test = row
    for symbol in re.findall(r"`(\w+\.py:[\w.]+)`", where):
        file, path = symbol.split(".py:")
        target = importlib.import_module(file)
        for part in path.split("."):
            target = getattr(target, part)
    fields = {field: choices for name in FILES for f, choices in [tokenizer.read_config(ROOT / f"{name}.py")] for field in f}
    for name, value in re.findall(r"--(\w+)(?:=([\w.]+))?", flag):
        assert name in fields, name
        assert not value or name not in fields[name] or value in fields[name][name], f"--{name}={value}"
    for name in re.findall(r"`(test_\w+)`", test):
        assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").glob("*.py")), name


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder in which README's commands make sense: book.txt, texts/, gpt2/ (a tiny Hugging Face folder) and a run in out/."""
    import torch
    import model as model_lib
    import train
    home = tmp_path_factory.mktemp("readme")
    (home / "book.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    (home / "texts").mkdir()
    words, draw = [f"w{i}" for i in range(400)], random.Random(0)
    lines = [" ".join(words[int(draw.paretovariate(0.8)) % 400] for _ in range(draw.randint(1, 12))) for _ in range(1500)]
    (home / "good.txt").write_text("\n".join(lines))
    for name in ("good.jsonl", "texts/a.jsonl"):
        (home / name).write_text("".join(json.dumps({"text": "\n".join(lines[i:i + 9])}) + "\n" for i in range(0, 1500, 9)))
    (home / "tok").mkdir()
    small = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--seq_len=32", "--tokens_per_step=64", "--steps=2", "--vocab_size=300"]
    run_train(f"--input={home}/book.txt", f"--out_dir={home}/out", f"--cache_dir={home}/cache", *small)
    fields = {k: v for k, v in model_lib.PRESETS["gpt2"].items() if k in train.ModelConfig.__dataclass_fields__}
    model = model_lib.Model(model_lib.ModelConfig(**fields | dict(n_layer=1, n_embd=16, n_head=2, seq_len=64, vocab_size=300)))
    model_lib.save_pretrained(model, home / "gpt2")
    tokenizer.load(home / "out/tokenizer").save(home / "gpt2")
    tokenizer.load(home / "out/tokenizer").save(home / "tok")
    return home


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c and "pip" not in c])
def test_train_command_plans(command, workspace, monkeypatch, capsys):
    """Every train.py command of README, with --plan (those that sample or time run as they are, quickly)."""
    monkeypatch.chdir(workspace)
    launcher, _, flags = command.partition("train.py")
    if "torchrun" in launcher:
        monkeypatch.setenv("WORLD_SIZE", re.search(r"--nproc_per_node=(\d+)", launcher)[1])
    argv = shlex.split(flags)
    if "--sample" in argv:
        return run_train(*argv, "--max_new_tokens=4")
    if "--bench" in argv:
        argv = [a for a in argv if a != "--bench" and not a.startswith("--bench_peer")]
    run_train(*argv, "--plan")
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("command", QUICK)
def test_quick_command_runs_whole(command, workspace):
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run([sys.executable, ROOT / words[1], *words[2:]], cwd=workspace, capture_output=True, text=True, input="best of times\n")
    assert done.returncode == 0 and done.stdout, done.stderr


def test_readme_speaks_of_files_that_exist():
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
