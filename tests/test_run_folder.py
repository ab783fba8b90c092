"""A run goes on in its own folder, starts in an empty one, and takes nobody else's."""

import json

import pytest
from processes import run_script

from rezero_hf.checkpoints import begin_checkpoint, finish_checkpoint
from rezero_hf.errors import UserError
from rezero_hf.run_folder import check_goes_on, claim_run_dir


RECIPE = "model: {hidden_size: 32}\ndata: {}\ntraining: {learning_rate: 0.1, save_steps: 5}\n"


def interrupted(path, recipe=RECIPE):
    """A run with a checkpoint and without an end."""
    claim_run_dir(path, recipe).lock.release()
    begin_checkpoint(path / "checkpoints" / "checkpoint-5")
    finish_checkpoint(path / "checkpoints" / "checkpoint-5", {"resumable": True})


def test_an_earlier_run_is_moved_aside_not_overwritten(tmp_path):
    """Each run gets an empty folder of its own; what a finished one wrote stays as it was."""
    run = tmp_path / "run"
    for number, text in enumerate(("model: {}", "model: {a: 1}", "model: {a: 2}")):
        claimed = claim_run_dir(run, text)
        assert claimed.aside == (tmp_path / f"run.{number}" if number else None) and not claimed.goes_on
        assert [path.name for path in run.iterdir()] == ["recipe.yaml"]
        (run / "run.json").write_text("{}")
        claimed.lock.release()
    assert [(tmp_path / f"run.{n}" / "recipe.yaml").read_text() for n in (1, 2)] == ["model: {}", "model: {a: 1}"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    """With the same recipe; what says only where and how it runs may change; once finished it is moved aside."""
    interrupted(tmp_path / "run")
    claimed = claim_run_dir(tmp_path / "run", RECIPE.replace("save_steps: 5", "save_steps: 7"))
    assert claimed.goes_on and claimed.aside is None
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-5").is_dir()
    assert "save_steps: 7" in (tmp_path / "run" / "recipe.yaml").read_text()
    claimed.lock.release()
    (tmp_path / "run" / "run.json").write_text(json.dumps({}))
    assert claim_run_dir(tmp_path / "run", RECIPE).aside == tmp_path / "run.1"


def test_another_recipe_does_not_take_over_an_interrupted_run(tmp_path):
    """The words that differ are named with the ways out, of which `restart` moves the run aside."""
    interrupted(tmp_path / "run")
    other = RECIPE.replace("0.1", "0.2").replace("32", "64")
    says = r"model.hidden_size: 32 -> 64; training.learning_rate: 0.1 -> 0.2.*--restart.*--output"
    with pytest.raises(UserError, match=says):
        claim_run_dir(tmp_path / "run", other)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == RECIPE
    claimed = claim_run_dir(tmp_path / "run", other, restart=True)
    assert claimed.aside == tmp_path / "run.1" and not claimed.goes_on
    assert (tmp_path / "run.1" / "checkpoints" / "checkpoint-5").is_dir()


def test_a_run_outlives_an_update_that_brings_words(tmp_path):
    """A word the run's recipe does not know had its default; at another value it is a change like any other."""
    interrupted(tmp_path / "run")
    later = RECIPE.replace("save_steps: 5", "save_steps: 5, momentum: 0.9")
    claimed = claim_run_dir(tmp_path / "run", later)
    assert claimed.goes_on
    claimed.lock.release()
    (tmp_path / "run" / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match=r"training.momentum: 0.9 -> 0.5"):
        claim_run_dir(tmp_path / "run", later.replace("0.9", "0.5"))


def test_a_folder_that_is_no_run_or_is_in_use_is_left_alone(tmp_path):
    """Somebody's documents are not moved away, and two runs never write into one folder."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis is not empty and holds no run; choose another folder with --output"):
        claim_run_dir(tmp_path / "thesis", RECIPE)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "mine"
    claimed = claim_run_dir(tmp_path / "run", RECIPE)
    code = f"from rezero_hf.run_folder import claim_run_dir; claim_run_dir({str(claimed.path)!r}, '')"
    (tmp_path / "claim.py").write_text(code)
    done = run_script(tmp_path / "claim.py")
    assert "another run is writing there" in done.stderr


def test_a_checkpoint_from_elsewhere_is_of_the_same_recipe(tmp_path):
    """But for the length of the run, and for where its data lie, which their fingerprint holds to."""
    check_goes_on(tmp_path, RECIPE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    check_goes_on(tmp_path, RECIPE.replace("save_steps: 5", "max_steps: 9").replace("data: {}", "data: {cache_dir: x}"))
    with pytest.raises(UserError, match=r"another recipe \(training.learning_rate: 0.1 -> 0.2\): put that back"):
        check_goes_on(tmp_path, RECIPE.replace("0.1", "0.2"))


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: no run can be written there \((Not a directory|File exists)\)"):
        claim_run_dir(tmp_path / "file" / "run", RECIPE)
