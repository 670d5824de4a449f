"""Parser messages as a user should read them."""

import pytest

from ant_lightning import ConfigError
from ant_lightning.cli.derived_settings import about_sizes
from ant_lightning.cli.messages import no_such_setting, one_line

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'ant_lightning.MultiTaskDiffusion'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'ant_lightning.DiTModule':
        {inner}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='x', val='y')"""


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (
            "Option 'class_dropot' is not accepted",
            "model.class_dropot: DiTModule has no such setting; "
            "did you mean 'model.class_dropout'?",
        ),
        (
            'Parser key "tasks.balancer":\n Expected a dot import path string: PCGrat',
            "model.tasks.balancer: no class is called 'PCGrat'; did you mean 'PCGrad'?",
        ),
        (
            "Parser key \"optimization.clip_grad_norm\":\n - Expected a <class 'float'>\n"
            " - Expected a <class 'NoneType'>\n Given value type: <class 'str'>\n"
            " Given value: abc",
            "model.optimization.clip_grad_norm: must be a number, found abc",
        ),
        (
            'Parser key "tasks.balancer":\n'
            " - Problem with given class_path 'ant_lightning.PCGrad':\n"
            " the following arguments are required: num_tasks",
            "model.tasks.balancer.num_tasks: needed, found nothing",
        ),
    ],
)
def test_the_innermost_mistake_is_what_is_said(inner, expected):
    assert one_line(NESTED.format(inner=inner)) == expected


def test_other_messages_keep_their_words_on_one_line():
    assert one_line("unrecognized\n  arguments: --xyz=3", ["--x.xyz"]) == (
        "xyz: the command has no such setting; did you mean 'x.xyz'?"
    )
    assert one_line("unrecognized arguments: --num_image", ["--samples.num_images"]) == (
        "num_image: the command has no such setting; did you mean 'samples.num_images'?"
    )
    assert no_such_setting("trainer.callbacks+", ["trainer.callbacks"]) == (
        "trainer.callbacks+: the command has no such setting; in a config a list replaces, "
        "--trainer.callbacks+ of the command line adds to it"
    )
    assert one_line('Parser key "config": File does not exist: a.yaml') == (
        "config: File does not exist: a.yaml"
    )


UNION = "Does not validate against any of the Union subtypes\nErrors:\n  - {}\n"
GIVEN = "  Given value type: <class 'str'>\n  Given value: {}"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Parser key \"to\":\n  Expected a typing.Literal['official', 'torch']. Got value: onnx",
            "to: must be one of 'official', 'torch', found onnx",
        ),
        (
            "Parser key \"ema\" element 1:\n  Expected a <class 'float'>. Got value: a",
            "ema: must be a number, found a",
        ),
        (
            'Parser key "merge_weights":\n'
            + UNION.format("Expected <class 'collections.abc.Sequence'>")
            + "  - Expected <class 'NoneType'>\n"
            + GIVEN.format("a"),
            "merge_weights: must be a list, found a",
        ),
        (
            'Parser key "trainer.logger":\n'
            + UNION.format("Expected a dot import path string: Foo")
            + "  - Expected a <class 'collections.abc.Iterable'>\n  - Expected a <class 'bool'>\n"
            + GIVEN.format("Foo"),
            "trainer.logger: no class is called 'Foo'; "
            "short names are tensorboard, wandb, mlflow, csv, comet",
        ),
        (
            UNION.format("Problem with given class_path 'a.b.CometLogger': Requirement not met")
            + "  - Expected a <class 'bool'>",
            "CometLogger: Requirement not met",
        ),
        ("the following arguments are required: to", "to: needed, found nothing"),
        (
            "unrecognized arguments: y",
            "y: the command has no place for it, as options begin with --",
        ),
    ],
)
def test_messages_of_commands_without_a_config(message, expected):
    assert one_line(message, ["--to", "--ema"]) == expected


def test_a_size_that_follows_from_the_data_is_said_to_be():
    error = ConfigError("model.backbone.patch_size: must divide input_size 30, found 4")
    option = "--model.init_args.backbone.init_args.input_size=30"
    assert str(about_sizes(error, [], [option])) == f"{error}; input_size is that of the data"
    assert about_sizes(error, [], []) is error
    other = ConfigError("input_sizes: none")
    assert about_sizes(other, [], [option]) is other


def test_a_first_stage_that_cannot_be_had_is_why_a_size_is_missing():
    error = ConfigError("model.backbone.input_size: needed, found nothing")
    stage = "{class_path: ant_lightning.FirstStage, init_args: {source: /nope}}"
    found = str(about_sizes(error, [f"--model.first_stage={stage}"], []))
    assert found == "model.first_stage.source: no such file or folder, found /nope"
    assert about_sizes(error, ["--model.class_path=DiTModule"], []) is error
