"""Every row of a study is tuned by the same rule, and what it comes to is made from its runs alone."""

from concurrent.futures import Future
from pathlib import Path

import pytest
from filelock import FileLock

from rezero_hf.errors import UserError
from rezero_hf.flops import flops_per_token
from rezero_hf.recipe import RecipeError, load_recipe
from rezero_hf.studies import run_study, tune
from rezero_hf.study_curves import ahead_from, first_at
from rezero_hf.study_figures import draw
from rezero_hf.study_page import study_card
from rezero_hf.study_plan import Cell, Row, Study, load_study
from rezero_hf.study_results import chosen_in, read_result, summarise
from rezero_hf.study_tables import study_table
from rezero_hf.tokenization import load_tokenizer


ROOT = Path(__file__).parents[1]
STUDIES = [path for path in sorted((ROOT / "scripts" / "recipes").glob("*.yaml")) if "\nstudy:" in path.read_text()]
RATE, WARMUP = "training.learning_rate", "training.warmup_steps"
LENGTH, SCHEDULE = "training.max_steps", "training.lr_scheduler_kwargs"


def record(value, seed, diverged=None, seconds=10.0):
    """A run that falls from 4 to its value in a straight line, over 100 steps."""
    curve = [
        {"step": step, "training_seconds": seconds * step / 100, "bits_per_byte": 4 + (value - 4) * step / 100}
        for step in (0, 25, 50, 75, 100)
    ]
    results = {split: {"bits_per_byte": value} for split in ("validation", "test")}
    run = {
        "seed": seed,
        "diverged": diverged,
        "results": {} if diverged else results,
        "curve": curve,
        "alpha": [],
        "threads": 1,
    }
    run |= {"training_seconds": seconds, "steps": 100, "parameters": 7, "flops": 9, "finished": "2026-01-01"}
    return run | {
        "command": "reproduce.py x",
        "versions": {},
        "git": None,
        "device": "a machine",
        "recipe": "",
        "data": {"sources": []},
    }


def tuned(study, row, value_of):
    """Tune a row whose runs end with `value_of(setting, seed)`; the runs, and the settings in the order they started."""
    started = []

    def start(setting, seed):
        started.append((setting, seed))
        future = Future()
        value = value_of(setting, seed)
        future.set_result(record(value or 0.0, seed, "step 3: the loss is nan" if value is None else None))
        return future

    return tune(study, Cell("row", row, {}), start, tell=lambda line: None), started


def test_a_grid_is_extended_until_the_best_is_inside():
    """The best rate lies below the grid; it is found, bracketed, and run with every seed, and nothing runs twice."""
    study = Study("item", {}, search={RATE: [0.004, 0.008]}, seeds=[0, 1, 2])
    runs, started = tuned(study, Row("row"), lambda setting, seed: 2 + abs(setting[RATE] - 0.001) * 100)
    chosen = [run for run in runs if run["chosen"]]
    assert [(run["set"], run["seed"]) for run in chosen] == [({RATE: 0.001}, seed) for seed in (0, 1, 2)]
    assert sorted({setting[RATE] for setting, _ in started}) == [0.0005, 0.001, 0.002, 0.004, 0.008]
    assert len(started) == len({(tuple(setting.items()), seed) for setting, seed in started}) == len(runs)


def test_a_warm_up_is_extended_upwards_and_none_at_all_is_no_edge():
    """From 0 and 10 by doubling; where 0 is best nothing is below it."""
    study = Study("item", {"row": Row("row")}, search={WARMUP: [0, 10]}, seeds=[0])
    runs, started = tuned(study, Row("row"), lambda setting, seed: 2 + abs(setting[WARMUP] - 20))
    assert [setting[WARMUP] for setting, _ in started] == [0, 10, 20, 40]
    assert summarise("demo", "cpu", study, {"row": runs})["rows"][0]["inside"] == {WARMUP: True}
    runs, started = tuned(study, Row("row"), lambda setting, seed: 2 + setting[WARMUP])
    assert [setting[WARMUP] for setting, _ in started] == [0, 10]
    assert summarise("demo", "cpu", study, {"row": runs})["rows"][0]["inside"] == {WARMUP: True}


def test_where_every_rate_diverges_lower_ones_are_tried_and_the_limit_is_kept():
    study = Study("item", {}, search={RATE: [0.004, 0.008]}, seeds=[0], extend=2)
    _, started = tuned(study, Row("row"), lambda setting, seed: None if setting[RATE] > 0.0015 else 2.0)
    assert min(setting[RATE] for setting, _ in started) == 0.001
    runs, _ = tuned(study, Row("row"), lambda setting, seed: None)
    assert all(run["diverged"] for run in runs)


def test_words_are_tuned_at_each_others_best():
    """The rate is bracketed again at the warm-up that was chosen, where another one is best."""
    study = Study("item", {"row": Row("row")}, search={RATE: [0.001, 0.002, 0.004], WARMUP: [10, 20]}, seeds=[0])

    def value(setting, seed):
        best = 0.002 if setting[WARMUP] == 10 else 0.004
        return 2 + abs(setting[RATE] - best) * 10 - (setting[WARMUP] == 20) * 0.1

    runs, _ = tuned(study, Row("row"), value)
    assert runs[0]["set"] == {RATE: 0.004, WARMUP: 20}
    assert any(run["set"][RATE] > 0.004 and run["set"][WARMUP] == 20 for run in runs)
    assert summarise("demo", "cpu", study, {"row": runs})["rows"][0]["inside"] == {RATE: True, WARMUP: True}
    # Bracketed is what lies between two others at the same warm-up: higher rates at another do not count.
    fewer = [run for run in runs if run["set"] != {RATE: 0.008, WARMUP: 20}]
    assert summarise("demo", "cpu", study, {"row": fewer})["rows"][0]["inside"] == {RATE: False, WARMUP: True}


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("training.global_batch_size", [8, 16], [4, 8, 16]),
        ("training.warmup_steps", [1, 2], [1, 2]),
        ("model.final_norm", [False, True], [False, True]),
        ("training.lr_drops", [[0.5], [0.7]], [[0.5], [0.7]]),
    ],
)
def test_only_a_scale_is_extended_and_a_whole_number_stays_whole(key, values, expected):
    """Where the first is best: half a batch, but no half step, and nothing beyond a yes, a no or a list."""
    study = Study("item", {}, search={key: values}, seeds=[0], extend=1)
    _, started = tuned(study, Row("row"), lambda setting, seed: 2 + expected.index(setting[key]))
    assert sorted(setting[key] for setting, _ in started) == expected
    assert all(type(setting[key]) is type(values[0]) for setting, _ in started)


def test_a_result_of_something_else_chooses_nothing(tmp_path):
    """Of another recipe, another size, a recipe that was changed since, no study, or no file: one line."""
    recipe = ROOT / "scripts" / "recipes" / "mlp_depth.yaml"
    committed = ROOT / "model_cards" / "results" / "mlp_depth.json"
    result = read_result(committed, "mlp_depth", "cpu")
    assert len(chosen_in(result, recipe)) == len(result["rows"])
    (tmp_path / "torn.json").write_text("{")
    for file, name, size in (
        *(
            (committed, "lm_depth", "cpu"),
            (committed, "mlp_depth", "full"),
            (tmp_path / "torn.json", "mlp_depth", "cpu"),
        ),
        *((committed.with_name("benchmark.json"), "benchmark", "cpu"), (tmp_path / "none.json", "mlp_depth", "cpu")),
    ):
        with pytest.raises(UserError, match=f"{file}: holds no result of this recipe in this size"):
            read_result(file, name, size)
    with pytest.raises(UserError, match=r"has changed since its rows were tuned \(study.seeds: \[7\] -> "):
        chosen_in({**result, "seeds": [7]}, recipe)


def test_a_word_that_makes_the_row_is_not_tuned():
    study = Study("item", {}, search={RATE: [0.001, 0.002], WARMUP: [0, 10]}, seeds=[0], extend=0)
    _, started = tuned(study, Row("row", set={WARMUP: 0}), lambda setting, seed: setting[RATE])
    assert [setting for setting, _ in started] == [{RATE: 0.001}, {RATE: 0.002}]


def test_a_table_shows_spread_targets_edges_and_divergence():
    """Mean and spread over seeds, steps and time to the target, the ratio to the baseline; a diverged row says so."""
    rows = {"base": Row("base line", reported="1x"), "fast": Row("fast"), "lost": Row("lost")}
    study = Study("item", rows, seeds=[0, 1], baseline="base", target_at=0.5, search={RATE: [1.0, 2.0]}, extend=0)
    ends = {"base": (2.0, 2.2), "fast": (1.0, 1.2), "lost": (None, None)}
    runs = {}
    for name, values in ends.items():
        cell = next(cell for cell in study.cells() if cell.row == name)
        chosen = [record(value or 0.0, seed, None if value else "nan") for seed, value in enumerate(values)]
        runs[cell.name] = [{**run, "set": {RATE: 2.0}, "chosen": True} for run in chosen]
        runs[cell.name].append({**record(3.0, 0), "set": {RATE: 1.0}, "chosen": False})
    result = summarise("demo", "cpu", study, runs, {"base": 0.1, "fast": 0.2})
    assert result["rows"][0]["target"] == pytest.approx(3.05)
    lines = study_table(result).splitlines()
    assert lines[2].startswith(
        "| base line | 1x | 2.100 ± 0.141 | 2.100 ± 0.141 | 50 ± 4 to 3.05 | 1.00x | 100 | 5.01 ± 0.373 | 9 | 10 |"
    )
    assert "| 33 ± 2 to 3.05 | 1.53x | 200 | 6.56" in lines[3]
    assert "learning_rate 2 (edge)" in lines[3]
    assert lines[4].count("diverged") == 2


def test_a_run_that_diverged_has_not_reached_the_target():
    """Whatever it passed on the way: no steps, no speed-up, and its page can be written, before its first evaluation too."""
    study = Study(
        "item", {"base": Row("base"), "lost": Row("lost")}, seeds=[0], baseline="base", target=3.0, ours="lost"
    )
    lost = {**record(2.0, 0, diverged="nan"), "set": {}, "chosen": True}
    for curve in (lost["curve"], []):
        runs = {"base": [{**record(2.0, 0), "set": {}, "chosen": True}], "lost": [{**lost, "curve": curve}]}
        result = summarise("demo", "cpu", study, runs, {"base": 0.1, "lost": 0.1})
        assert study_table(result).splitlines()[3].startswith("| lost |  | diverged | diverged |  |  | 100 |  |")
        assert "# item" in study_card(result, [])


def test_where_all_signals_diverged_the_other_pictures_are_drawn(tmp_path):
    study = Study("item", {"rezero": Row("ReZero")}, seeds=[0], signal=True)
    run = {**record(2.0, 0, diverged="nan"), "set": {}, "chosen": True, "signal": {}}
    drawn = draw(summarise("demo", "cpu", study, {"rezero": [run]}), tmp_path)
    assert [path.name for path in drawn] == ["curves.png"]


def test_each_depth_is_held_against_its_own_baseline(tmp_path):
    """Targets, speed-ups and pictures are of one value of `across`, never of another one's baseline."""
    rows = {"base": Row("base line"), "fast": Row("fast")}
    depths = {"model.depths": [[2, 2], [4, 4]]}
    study = Study("item", rows, seeds=[0], baseline="base", target_at=0.5, across=depths, extend=0)
    ends = {("base", 2): 2.0, ("fast", 2): 1.0, ("base", 4): 3.0, ("fast", 4): 2.0}
    runs = {
        cell.name: [{**record(ends[cell.row, cell.at["model.depths"][0]], 0), "set": {RATE: 1.0}, "chosen": True}]
        for cell in study.cells()
    }
    result = summarise("demo", "cpu", study, runs)
    assert [row["target"] for row in result["rows"]] == [3.0, 3.0, 3.5, 3.5]
    assert study_table(result).count(" 1.00x ") == 2
    assert "| 25 to 3.5 | 2.00x |" in study_table(result)
    drawn = {path.name for path in draw(result, tmp_path)}
    at_each = {"curves_2-2.png", "steps_2-2.png", "curves_4-4.png", "steps_4-4.png"}
    assert drawn == {"depths.png", *at_each}
    # Where nothing was tuned, ends are not held against each other.
    for row in result["rows"]:
        row["chosen"] = {}
    assert {path.name for path in draw(result, tmp_path)} == at_each


def test_what_a_study_varies_cannot_be_overridden(tmp_path):
    """A seed, a word that is tuned and one that makes a row, over all rows, would make them the same."""
    (recipe,) = (path for path in STUDIES if path.stem == "mlp_depth")
    for word in ("training.seed=1", "training.learning_rate=0.1", "model.residual=plain"):
        with pytest.raises(RecipeError, match="is what the study varies"):
            run_study(recipe, load_study(recipe), tmp_path / "runs", overrides=(word,))


def test_two_studies_do_not_run_into_one_folder(tmp_path):
    (recipe,) = (path for path in STUDIES if path.stem == "mlp_depth")
    with FileLock(tmp_path / ".runs.lock"), pytest.raises(UserError, match="a study is being run there"):
        run_study(recipe, load_study(recipe), tmp_path / "runs")


def test_ahead_means_for_good():
    """With every seed, or in their mean; a lead that is lost for a while begins where it is back; what has diverged is
    behind. At equal times a slower row is compared with what the other one has come to meanwhile."""

    def row(*curves, takes=None, every=10, diverged=None):
        runs = [{"curve": [{"step": every * (k + 1), "loss": v} for k, v in enumerate(c)]} for c in curves]
        return {"runs": [{**run, "diverged": diverged} for run in runs], "step_seconds": takes}

    ours, other = row([5, 3, 2, 1], [5, 3, 2, 1]), row([6, 4, 3, 2], [6, 4, 1.5, 2])
    assert ahead_from(ours, other, "loss") == 40
    assert ahead_from(ours, row([6, 4, 3, 2], [6, 4, 3, float("nan")]), "loss") == 10
    assert ahead_from(ours, row([4, 4], [4, 4]), "loss") == 20
    assert ahead_from(row([4, 4], [4, 4]), ours, "loss") is None
    assert ahead_from(other, ours, "loss") is None
    assert ahead_from(ours, other, "loss", mean=True) == 10
    assert ahead_from(ours, row([6, 4, 3, 2], [6, 4, 3, float("nan")]), "loss", mean=True) == 10
    # 40 s after the start one has 3 and the other is at its end with 2, which the slower one passes after its third point.
    fast, slow = row([6, 4, 3, 2], takes=1.0), row([5, 3, 2, 1], takes=2.0)
    assert ahead_from(slow, fast, "loss", seconds=True) == 80.0 and ahead_from(slow, fast, "loss") == 10
    assert ahead_from(fast, row([5, 3, 2, 1.9], takes=2.0), "loss", seconds=True) is None
    # Of accuracy more is better.
    accuracy = [
        {"runs": [{"curve": [{"step": 10, "accuracy": value}], "diverged": None}], "step_seconds": None}
        for value in (0.7, 0.6)
    ]
    assert ahead_from(*accuracy, "accuracy") == 10
    # A shorter run stays where it ended, unless it diverged there; one that is measured less often is read in between.
    assert ahead_from(row([3, 1]), row([4, 3, 2]), "loss") == 10
    assert ahead_from(row([3, 1], diverged="nan"), row([4, 3, 2]), "loss") is None
    assert ahead_from(row([4, 3, 2]), row([3, 1], diverged="nan"), "loss") == 30
    assert ahead_from(row([2, 0.5]), row([3, 1], diverged="nan"), "loss") == 10
    assert ahead_from(row([3, 1], every=20), row([6, 5, 4, 3]), "loss") == 20
    assert ahead_from(row([6, 5, 4, 3]), row([7, 3.5], every=20), "loss") == 20


def test_a_target_is_read_between_two_evaluations():
    curve = record(2.0, 0)["curve"]
    assert first_at(curve, "bits_per_byte", 3.25) == {"steps": 37.5, "seconds": 3.75}
    assert first_at(curve, "bits_per_byte", 1.0) is None
    assert first_at(curve[1:], "bits_per_byte", 3.75) == {"steps": 25.0, "seconds": 2.5, "within": True}
    rising = [
        {"step": 1, "training_seconds": 1.0, "accuracy": 0.2},
        {"step": 3, "training_seconds": 2.0, "accuracy": 0.6},
    ]
    assert first_at(rising, "accuracy", 0.4) == {"steps": 2.0, "seconds": 1.5}


def flops(path, cell):
    """What a row of a text recipe takes for a sequence of every step, the run before it included."""
    plans = [load_recipe(path, words) for words in (cell.overrides({}), cell.first({})) if words is not None]
    of_a_step = [
        plan.data.block_size
        * flops_per_token(plan.model_config(load_tokenizer(plan.data.tokenizer)), plan.data.block_size)
        for plan in plans
    ]
    return sum(plan.training["max_steps"] * each for plan, each in zip(plans, of_a_step, strict=True))


@pytest.mark.parametrize("recipe", STUDIES, ids=lambda recipe: recipe.stem)
def test_a_committed_study_is_fair_by_its_words(recipe):
    """Rows differ in what they are, in nothing else: no row sets a rate, a seed, data or a length of its own.

    Every row is tuned over the study's whole grid, from values of its own at most; a rival may be tuned over its warm-up
    besides, and a row with gates over their rate, which is said on its page. Rows of several depths in turn may have
    lengths of their own, if all of them take the same FLOP, and the same schedules.
    """
    study = load_study(recipe)
    if any(row.first for row in study.rows.values()):
        spent = [flops(recipe, cell) for cell in study.cells()]
        assert max(spent) < 1.01 * min(spent), spent
        assert len({str(row.first.get(SCHEDULE)) for row in study.rows.values()}) == 1
    for name, row in study.rows.items():
        begins = ("init_from.", LENGTH) if row.first else ("init_from.path",) if study.bases else ()
        for key in row.set:
            fair = ("model.", "training.gate_lr_", *begins)
            assert key.startswith(fair) or (key, row.set[key]) == (WARMUP, 0), key
        assert set(row.first) <= {"model.num_hidden_layers", LENGTH, SCHEDULE}
        assert set(row.search) <= {"training.gate_lr_multiplier"} | (
            set() if name.startswith("rezero") else {RATE, WARMUP}
        )
        assert all(len(values) > 1 for values in row.search.values())
        # To be tuned in more words than the others is an advantage.
        assert study.note or not row.search.keys() - study.search.keys(), name
    for size in ("full", "smoke"):
        if f"\n{size}:" in recipe.read_text():
            sized = load_study(recipe, size)
            load_recipe(recipe, **{size: True})
            # Another size's grid, often for another optimiser, is one for every row.
            moved = {key for key in sized.search if sized.search[key] != study.search.get(key)}
            for name, row in sized.rows.items() if size == "full" else ():
                assert all(row.search[key] != study.rows[name].search[key] for key in moved & row.search.keys()), name


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("{}", "has no section study with rows"),
        ("{item: x, rows: {a: {label: a, sett: {}}}}", r"study\.rows\.a: key 'sett' is unknown; did you mean 'set'"),
        ("{item: x, rows: {a: {label: a}}, baseline: b}", r"study\.baseline 'b' is unknown"),
        ("{item: x, rows: {a: {label: a, set: {model.residul: plain}}}}", "did you mean 'residual'"),
        ("{item: x, rows: {a: {label: a}}, metric: bpb}", "expected one of bits_per_byte, loss, accuracy"),
        ("{item: x, rows: {a: {label: a}}, search: {lr: [1]}}", "'lr': section 'lr' is unknown"),
        ("{item: x, rows: {a: {label: a, first: {model.depth: 2}}}}", "key 'depth' is unknown"),
        ("{item: x, rows: {a: {label: a, set: {init_from.grow_to: 4}}}}", "needs init_from.path"),
        ("{item: x, rows: {a: {label: a, first: {model.num_hidden_layers: 2}}}, baseline: a}", "compares steps"),
        ("{item: x, rows: {a: {label: a}}, metric: accuracy}", "metric='accuracy': is not measured here; take one of"),
        ("{item: x, rows: {a: {label: a}}, seeds: [-1]}", r"seeds=\[-1\]: needs numbers from 0"),
        ("{item: x, rows: {a: {label: a}}, seeds: [one]}", r"seeds"),
        ("{item: x, rows: {a: {label: a}}, extend: -1}", "extend=-1: needs to be at least 0"),
        ("{item: x, rows: {a: {label: a}}, target_at: 2.0}", r"target_at=2\.0: is a share of the steps"),
        (
            "{item: x, across: {model.hidden_size: [8, 16]}, rows: {a: {label: a, set: {model.hidden_size: 8}}}}",
            r"study\.rows\.a: model\.hidden_size is what study\.across varies",
        ),
        ("{item: x, rows: {}}", "study: rows={}: needs a list with at least one entry"),
        ("{item: x, rows: {a: {label: a}}, seeds: []}", r"study: seeds=\[\]: needs a list"),
        ("{item: x, rows: {a: {label: a}}, seeds: [0, 0]}", r"study: seeds=\[0, 0\]: has one twice"),
        ("{item: x, rows: {a: {label: a}, b: {label: a}}}", r"study: rows: label=\['a', 'a'\]: has one twice"),
        ("{item: x, rows: {a/b: {label: a}}, ours: a/b}", "'a/b' names a folder .* another plain word"),
        ("{item: x, rows: {figures: {label: a}}, ours: figures}", "'figures' names a folder beside bases, figures"),
        ("{item: x, rows: {a: {label: a}}, ours: a, bases: {../b: {}}}", "'../b' names a folder"),
        ("{item: x, rows: {a: {label: a}}, across: {model.hidden_size: [8, 8]}}", r"size=\[8, 8\]: has one twice"),
        ("{item: x, rows: {a: {label: a}}, across: {model.hidden_size: []}}", r"model.hidden_size=\[\]: needs a list"),
        ("{item: x, rows: {a: {label: a}}, search: {training.learning_rate: []}}", r"learning_rate=\[\]: needs a list"),
        ("{item: x, rows: {a: {label: a}}, search: {training.learning_rate: [3e-4]}}", r"write 3\.0e-4"),
        ("{item: x, rows: {a: {label: a}}, search: {training.learning_rat: [0.1]}}", "did you mean 'learning_rate'"),
        ("{item: x, rows: {a: {label: a}}, ours: b}", r"study\.ours 'b' is unknown"),
        ("{item: x, rows: {a: {label: a}}, against: b}", r"study\.against 'b' is unknown"),
        ("{item: x, rows: {a: {set: {}}}}", r"study\.rows\.a: label is missing"),
        ("{rows: {a: {label: a}}}", "study: item is missing"),
        (
            "{item: x, rows: {a: {label: a}}}\nfull: {study.targett: 1}",
            "key 'targett' is unknown; did you mean 'target'",
        ),
        ("{item: x, rows: {a: {label: a}}}\nfull: [1]", "section full is not a mapping"),
        ("{item: x, rows: {a: {label: a}}}\nfull: {study.rows.b.label: c}", r"full\.study\.rows: row 'b' is unknown"),
        (
            "{item: x, rows: {a: {label: a}}}\nfull: {study.rows.a.lab: c}",
            r"full\.study\.rows\.a: key 'lab' is unknown",
        ),
        ("{item: x, rows: {a: {label: a}}}\nsmoke: {1: 2}", "smoke: '1' is not section.key"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(tmp_path, study, message):
    path = tmp_path / "demo.yaml"
    path.write_text(f"model: {{hidden_size: 64}}\nstudy: {study}\n")
    with pytest.raises(RecipeError, match=message) as caught:
        load_study(path)
    assert "\n" not in str(caught.value)
