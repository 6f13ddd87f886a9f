"""The networks are the published ones: sizes, order of operations, and everything scales from there."""

import operator

import pytest
import torch
from torch import fx, nn

from analysis.names import name_of
from dynamics.data import DATASETS
from dynamics.models import MODELS, VGG, MobileNet, ResNet, build


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def followers(model: nn.Module) -> list[list[object]]:
    """For each convolution the two operations behind it: module types, or functions, along a graph without branches."""
    graph = fx.symbolic_trace(model)
    modules = dict(graph.named_modules())
    operations: list[list[object]] = []
    for node in graph.graph.nodes:
        if isinstance(modules.get(str(node.target)), nn.Conv2d):
            (first,) = node.users
            (second, *_) = first.users
            operations.append([type(modules[n.target]) if n.op == "call_module" else n.target for n in (first, second)])
    return operations


PARAMETERS = {  # of 10 and of 100 classes
    "vgg13": (9_413_066, 9_459_236),
    "mobilenet_v1": (3_217_226, 3_309_476),
    "resnet56": (855_770, 861_620),
}


def test_every_model_has_a_published_count() -> None:
    assert {*PARAMETERS} == {*MODELS}, "write how many parameters the model has where it was published"


def test_every_model_and_data_set_has_its_name_in_print() -> None:
    unnamed = [name for name in (*MODELS, *DATASETS) if name_of(name) == name.replace("_", " ")]
    assert unnamed == ["digits"], "analysis/names.py is to have what models and data sets are called in print"


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str, place: int) -> None:
    model = build(name, num_classes=(10, 100)[place])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name][place]


@pytest.mark.parametrize(
    ("name", "layers", "filters"), [("vgg13", 10, 2944), ("mobilenet_v1", 27, 10944), ("resnet56", 57, 2128)]
)
def test_convolutions_have_the_published_filters(name: str, layers: int, filters: int) -> None:
    widths = [convolution.out_channels for convolution in convolutions(build(name, num_classes=10)).values()]
    assert (len(widths), sum(widths)) == (layers, filters)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("vgg13", [32] * 2 + [16] * 2 + [8] * 2 + [4] * 2 + [2] * 2),
        ("mobilenet_v1", [32] * 3 + [16] * 4 + [8] * 4 + [4] * 12 + [2] * 4),
        ("resnet56", [32] * 19 + [16] * 19 + [8] * 19),
    ],
)
def test_resolution_falls_where_published(name: str, sides: list[int]) -> None:
    model, seen = build(name, num_classes=10, width=0.1), []
    for convolution in convolutions(model).values():
        convolution.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    model(torch.rand(2, 3, 32, 32))
    assert seen == sides


@pytest.mark.parametrize("width", [0.001, 0.3, 2])
@pytest.mark.parametrize("name", MODELS)
def test_width_scales_every_inner_channel_count(name: str, width: float) -> None:
    with torch.device("meta"):
        published, scaled = (
            build(name, num_classes=7, in_channels=5, width=factor).state_dict() for factor in (1, width)
        )
    assert list(published) == list(scaled)
    *inside, _, _ = [key for key, before in published.items() if before.dim()]  # the last two are the head's
    for key in inside:
        (was, *_), (now, *_) = published[key].shape, scaled[key].shape
        assert now == max(1, round(width * was)), key
        assert published[key].shape[2:] == scaled[key].shape[2:], key
    with torch.device("meta"):
        assert build(name, num_classes=7, in_channels=5, width=width)(torch.empty(2, 5, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_images_become_one_logit_a_class(name: str, in_channels: int) -> None:
    model = build(name, num_classes=7, in_channels=in_channels, width=0.25)
    assert model(torch.rand(2, in_channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_traced_network_computes_the_same(name: str) -> None:
    model = build(name, num_classes=10, width=0.25).eval()
    inputs = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(fx.symbolic_trace(model)(inputs), model(inputs), rtol=0, atol=0)


def test_vgg_normalises_what_the_relu_lets_through() -> None:
    assert followers(build("vgg13", num_classes=10, width=0.1)) == [[nn.ReLU, nn.BatchNorm2d]] * 10


def test_mobilenet_normalises_before_the_relu() -> None:
    assert followers(build("mobilenet_v1", num_classes=10, width=0.1)) == [[nn.BatchNorm2d, nn.functional.relu]] * 27


def test_resnet_normalises_then_adds_or_rectifies() -> None:
    operations = followers(ResNet(8, num_classes=10))
    rectified, added = [nn.BatchNorm2d, nn.functional.relu], [nn.BatchNorm2d, operator.add]
    projected = [rectified, added, added]
    assert operations == [rectified, rectified, added, *projected, *projected]


def test_every_residual_sum_is_rectified() -> None:
    graph = fx.symbolic_trace(build("resnet56", num_classes=10, width=0.1)).graph
    sums = [node for node in graph.nodes if node.target is operator.add]
    assert len(sums) == 27
    assert all([user.target for user in node.users] == [nn.functional.relu] for node in sums)


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_resnet_depth_counts_its_layers(depth: int) -> None:
    model = ResNet(depth, (2, 4, 8), num_classes=10)
    projections = [name for name in convolutions(model) if "shortcut" in name]
    assert len(projections) == 2
    assert len(convolutions(model)) - len(projections) + 1 == depth


@pytest.mark.parametrize("name", MODELS)
def test_only_the_stem_of_a_resnet_is_protected(name: str) -> None:
    model = build(name, num_classes=10)
    assert model.protected == (("stem",) if name == "resnet56" else ())
    assert set(model.protected) <= set(convolutions(model))


def test_small_networks_follow_their_configuration() -> None:
    vgg = VGG([8, 8, "M", 16, "M", 16, "M", 32, "M", 32, "M"], num_classes=10)
    assert [convolution.out_channels for convolution in convolutions(vgg).values()] == [8, 8, 16, 16, 32, 32]
    mobilenet = MobileNet(4, [(8, 2), (8, 2), (16, 2), (16, 2)], num_classes=10)
    assert [c.out_channels for c in convolutions(mobilenet).values()] == [4, 4, 8, 8, 8, 8, 16, 16, 16]
    for model in (vgg, mobilenet):
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "vgg16"}, f"^unknown model 'vgg16': choose one of {', '.join(MODELS)}$"),
        ({"num_classes": 0}, "^num_classes is 0: it must be 1 or more$"),
        ({"in_channels": -3}, "^in_channels is -3: it must be 1 or more$"),
        ({"width": 0}, "^width is 0: it must be a positive factor"),
        ({"width": float("nan")}, "^width is nan: it must be a positive factor"),
        ({"width": float("inf")}, "^width is inf: it must be a positive factor"),
    ],
)
def test_wrong_argument_is_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**{"name": "vgg13", "num_classes": 10, **wrong})


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_resnet_of_impossible_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^depth is {depth}: a residual network has 6n \+ 2 layers"):
        ResNet(depth, num_classes=10)
