"""The documents tell the truth: their snippets run, and what they name exists: paths, flags, words, messages, modules."""

import ast
import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rezero_hf import ReZeroConfig, ReZeroForCausalLM, byte_tokenizer
from rezero_hf.arguments import ReZeroTrainingArguments
from rezero_hf.recipe import FAMILIES, load_recipe
from rezero_hf.sources import Source
from rezero_hf.starting import InitFrom
from rezero_hf.strict import RecipeError, default_of, field_types, plain
from rezero_hf.study_plan import load_study
from rezero_hf.tasks import TaskConfig


ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(language):
    """Where each block of code begins, and what it says."""
    return {
        f"{name}:{text.count(chr(10), 0, found.start()) + 2}": found[1]
        for name, text in DOCUMENTS.items()
        for found in re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)
    }


SNIPPETS, RECIPES = blocks("python"), blocks("yaml")
CHECKS = runpy.run_path(str(ROOT / "scripts" / "clients" / "checks.py"))
# What needs packages that `make integrations` alone installs: the heading in docs/using.md, and the client that runs it.
ELSEWHERE = {"TRL": "trl_sft", "lm-eval": "lm_eval_task", "torchao": "torchao_int8", "A server": "serve"}
TREE = re.search(r"## What is where\n\n```\n(.*?)```", DOCUMENTS["CONTRIBUTING.md"], re.DOTALL)[1]

every_document = pytest.mark.parametrize("name", DOCUMENTS)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that holds a small `runs/quickstart/model`, as after `make pretrain`."""
    folder = tmp_path_factory.mktemp("workplace")
    tokenizer = byte_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, gate_init=0.5, **ids)
    ReZeroForCausalLM(config).save_pretrained(folder / "runs" / "quickstart" / "model")
    tokenizer.save_pretrained(folder / "runs" / "quickstart" / "model")
    return folder


def snippets_here():
    """All but those that run elsewhere. Transformers has exporters that save since 5.23."""
    elsewhere = [CHECKS["snippet"](heading) for heading in ELSEWHERE]
    for where, code in SNIPPETS.items():
        if code not in elsewhere:
            yield pytest.param(where, marks=[pytest.mark.since("5.23")] if "transformers.exporters" in code else [])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("where", snippets_here())
def test_a_snippet_runs_as_printed(workplace, monkeypatch, where):
    """With names of its own; one that does not import the package runs in a process that cannot import it."""
    code = SNIPPETS[where]
    if "rezero_hf" in code:
        monkeypatch.chdir(workplace)
        exec(compile(code, where, "exec"), {"__name__": "__main__"})
        return
    code = "import sys; sys.modules['rezero_hf'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"


def test_a_snippet_that_does_not_run_here_is_run_by_its_client():
    """By one that `make integrations` starts, read from the page."""
    clients = runpy.run_path(str(ROOT / "scripts" / "integrations.py"))["CLIENTS"]
    for heading, file in ELSEWHERE.items():
        assert file in [started for _, started in clients.values()]
        nodes = ast.walk(ast.parse((ROOT / "scripts" / "clients" / f"{file}.py").read_text(encoding="utf-8")))
        calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "follow"]
        assert [call.args[0].value for call in calls] == [heading]


def test_a_client_runs_the_snippet_as_printed(workplace, tmp_path, capsys):
    """On the checkpoint that it is given."""
    check = CHECKS["follow"]("The stock pipeline", workplace / "runs" / "quickstart" / "model", tmp_path)
    assert (check.value, check.limit) == (0, 0)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("where", RECIPES)
def test_a_recipe_loads_as_printed(tmp_path, where):
    """Also as small as its `smoke` makes it, and with its rows where it is a study."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[where], encoding="utf-8")
    for smoke in (False, True):
        load_recipe(path, smoke=smoke).data.check()
    if "item" in yaml.safe_load(RECIPES[where]).get("study", {}):
        load_study(path, "smoke")


def test_every_default_that_the_guide_to_recipes_shows_is_the_real_one():
    language, data = FAMILIES["rezero"]
    sections = {"model": language, "data": data, "training": ReZeroTrainingArguments, "": Source}
    sections |= {"init_from": InitFrom, "task": TaskConfig}
    shown = re.findall(r"^\| `(?:(\w+)\.)?(\w+)` \| `([^`]+)` \|", DOCUMENTS["docs/recipes.md"], re.MULTILINE)
    assert len(shown) > 30
    for section, key, value in shown:
        fields = {field.name: field for field in dataclasses.fields(sections[section])}
        # YAML reads `no` as false, and recipes take it for the word.
        said = "no" if value == "no" else yaml.safe_load(value)
        assert said == plain(default_of(fields[key])), f"{section}.{key}"


def test_a_mistake_in_a_recipe_says_what_the_guide_quotes(tmp_path):
    path = tmp_path / "recipe.yaml"
    shown = re.findall(r"^\| `(\w+: \{[^`]+)` \| `([^`]+)` \|", DOCUMENTS["docs/recipes.md"], re.MULTILINE)
    assert len(shown) > 5
    for mistake, message in shown:
        path.write_text(mistake, encoding="utf-8")
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe(path)


def test_every_module_and_script_is_in_the_tree_and_every_file_of_the_tree_exists():
    named = set(re.findall(r"[\w.-]+\.(?:py|md|yaml|cff|svg)\b", TREE))
    package = {path.name for path in (ROOT / "rezero_hf").rglob("*") if path.suffix in (".py", ".md")}
    scripts = {path.name for path in (ROOT / "scripts").rglob("*") if path.suffix in (".py", ".yaml")}
    assert package | scripts <= named
    guides = {path.name for path in (ROOT / "docs").rglob("*.*")}
    assert named - package - scripts == guides | {"CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LOG.md"}


@every_document
def test_every_path_link_and_make_target_exists(name):
    text, makefile = DOCUMENTS[name], (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in re.findall(r"(?:scripts|rezero_hf|tests|docs|model_cards)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else ()
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link


def commands():
    """(document, script, subcommand or "", flags) of every call of a script in a block of shell or in a code span."""
    for name, text in DOCUMENTS.items():
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for code in (*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))):
            lines = re.sub(r"\\\n", " ", code).splitlines()
            for line in (re.sub(r"\s#.*", "", line) for line in lines if "scripts/" in line):
                for script, words in re.findall(r"scripts/(\w+)\.py(.*)", line):
                    verb = re.match(r" (fold|grow|prune) ", words) if script == "surgery" else None
                    yield name, script, verb[1] if verb else "", re.findall(r"(?<!\S)--[\w-]+", words)


def test_every_flag_of_a_script_is_one_that_its_help_has(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    wanted = {}
    for name, script, verb, flags in commands():
        if flags:
            wanted.setdefault((script, verb), []).append((name, flags))
    assert wanted
    for (script, verb), uses in wanted.items():
        monkeypatch.setattr(sys, "argv", [script, *filter(None, [verb]), "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        for name, flags in uses:
            assert known.issuperset(flags), (name, script, verb, set(flags) - known)


@every_document
def test_every_word_of_a_recipe_is_a_field(name):
    """`section.key=value`, as it is said over a recipe."""
    configs, data = zip(*FAMILIES.values(), strict=True)
    sections = {"model": configs, "data": data, "training": (ReZeroTrainingArguments,), "init_from": (InitFrom,)}
    sections |= {"task": (TaskConfig,)}
    for section, key in re.findall(rf"(?<![\w./])({'|'.join(sections)})\.(\w+)=", DOCUMENTS[name]):
        assert any(key in field_types(cls) for cls in sections[section]), f"{section}.{key}"


def source_strings():
    """Every string in the package and the scripts, with `...` for what is filled in."""
    for path in (*(ROOT / "rezero_hf").rglob("*.py"), *(ROOT / "scripts").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_quoted_message_is_one_of_the_source():
    by_message = DOCUMENTS["docs/troubleshooting.md"].partition("## By message")[2].partition("## By symptom")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", by_message, re.MULTILINE)
    known = list(source_strings())
    assert len(quoted) == by_message.count("\n| `")
    assert [message for message in quoted if not any(message in text for text in known)] == []


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    people = citation["preferred-citation"]["authors"]
    assert [person["family-names"] for person in people] == ["Bachlechner", "Majumder", "Mao", "Cottrell", "McAuley"]
