import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from supsup_lightning import SupSup
from supsup_lightning.errors import ConfigurationError, DataError
from supsup_lightning.networks import GEMResNet18, ResNet50, timm_model, torchvision_model

SMALL = (3, 32, 32)
HEAD = "classifier.1"  # of SqueezeNet


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture
def saved(tmp_path):
    """A SqueezeNet with 7 outputs, and the file of its state_dict."""
    network = torchvision_model(name="squeezenet1_1", output_size=7, input_shape=SMALL)
    path = tmp_path / "squeezenet.pt"
    torch.save(network.state_dict(), path)
    return network, path


def assert_equal_but_for_the_head(network: nn.Module, other: nn.Module) -> None:
    ours, theirs = network.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert name.startswith(HEAD) or torch.equal(ours[name], theirs[name]), name


# The paper's networks.


@pytest.mark.parametrize("size", [8, 32, 64])
def test_gem_resnet_takes_images_of_any_size(size):
    network = GEMResNet18(output_size=5)
    assert num_parameters(network) == 1_090_940
    assert network(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_gem_resnet_has_other_channels():
    network = GEMResNet18(output_size=9, input_shape=(1, 28, 28), base_channels=4)
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 9)
    assert network[0].weight.shape == (4, 1, 3, 3)


def test_gem_resnet_has_weights_and_running_statistics_only():
    network = GEMResNet18(output_size=5)
    assert {parameter.ndim for parameter in network.parameters()} == {2, 4}
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    assert len(norms) == 20  # 17 after 3 x 3 convolutions, 3 on shortcuts
    assert all(norm.weight is None and norm.running_mean is not None for norm in norms)


def test_gem_resnet_halves_the_image_in_three_stages():
    network = GEMResNet18(output_size=5).eval()
    shapes, images = [], torch.randn(2, *SMALL)
    for layer in list(network)[:-3]:
        images = layer(images)
        shapes.append(tuple(images.shape[1:]))
    assert shapes[2::2] == [(20, 32, 32), (20, 32, 32), (40, 16, 16), (80, 8, 8), (160, 4, 4)]


@pytest.mark.parametrize("channels", [1, 3])
def test_resnet50_has_weights_only(channels):
    network = ResNet50(output_size=10, input_shape=(channels, 64, 64)).eval()
    with torch.no_grad():
        assert network(torch.randn(2, channels, 64, 64)).shape == (2, 10)
    assert {parameter.ndim for parameter in network.parameters()} == {2, 4}
    plain = torchvision.models.resnet50(num_classes=10)
    vectors = sum(parameter.numel() for parameter in plain.parameters() if parameter.ndim == 1)
    assert num_parameters(network) == num_parameters(plain) - vectors - (3 - channels) * 64 * 7 * 7


# torchvision.


@pytest.mark.parametrize(
    ("name", "input_shape"),
    [("resnet18", SMALL), ("resnet18", (1, 8, 8)), ("vit_b_32", (1, 64, 64)), ("googlenet", (3, 64, 64))],
)
def test_a_torchvision_model_trains(name, input_shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = torchvision_model(name=name, output_size=5, input_shape=input_shape)
    outputs = network.train()(torch.randn(2, *input_shape))
    assert outputs.shape == (2, 5)
    outputs.sum().backward()


def test_a_model_with_auxiliary_heads_has_them_on_demand():
    options = {"aux_logits": True}
    network = torchvision_model(name="googlenet", output_size=5, options=options)
    assert network.aux1.fc2.out_features == 5
    assert options == {"aux_logits": True}


def test_a_first_convolution_for_other_channels_keeps_its_settings():
    for name in ("resnet18", "squeezenet1_1", "mobilenet_v2"):
        old, new = (torchvision_model(name=name, output_size=2, input_shape=(c, 32, 32)) for c in (3, 1))
        old, new = (next(m for m in network.modules() if isinstance(m, nn.Conv2d)) for network in (old, new))
        assert new.weight.shape == (old.out_channels, 1, *old.kernel_size)
        assert str(new) == str(old).replace("Conv2d(3,", "Conv2d(1,")


def test_batch_norm_without_gains():
    network = torchvision_model(name="resnet18", output_size=5, input_shape=SMALL, affine=False)
    assert {name.rpartition(".")[2] for name, _ in network.named_parameters()} == {"weight", "bias"}  # the head's bias
    assert [name for name, parameter in network.named_parameters() if parameter.ndim == 1] == ["fc.bias"]
    assert network(torch.randn(2, *SMALL)).shape == (2, 5)
    with pytest.raises(ConfigurationError, match="network.affine=false has no effect.*squeezenet1_1"):
        torchvision_model(name="squeezenet1_1", output_size=5, affine=False)


def test_unknown_names_come_with_suggestions():
    with pytest.raises(ConfigurationError, match="network.name='resnet81'.*did you mean .*resnet18"):
        torchvision_model(name="resnet81", output_size=5)
    with pytest.raises(ConfigurationError, match="not a classification model"):
        torchvision_model(name="fasterrcnn_resnet50_fpn", output_size=5)
    with pytest.raises(ConfigurationError, match="no name is near"):
        torchvision_model(name="@", output_size=5)


@pytest.mark.parametrize(
    ("name", "input_shape", "options", "match"),
    [
        ("resnet18", SMALL, {"depth": 3}, "depth"),
        ("resnet18", SMALL, {"num_classes": 3}, "num_classes"),
        ("vit_b_16", (3, 40, 40), {}, "indivisible"),
        ("vit_b_16", (3, 64, 32), {}, "square"),
        ("maxvit_t", (3, 96, 96), {}, "not divisible"),
    ],
)
def test_what_cannot_be_built_is_refused(name, input_shape, options, match):
    with pytest.raises(ConfigurationError, match=match):
        torchvision_model(name=name, output_size=5, input_shape=input_shape, options=options)


def test_weights_from_a_file_are_taken_but_for_the_head(saved):
    network, path = saved
    loaded = torchvision_model(name="squeezenet1_1", output_size=5, input_shape=SMALL, weights=str(path))
    assert_equal_but_for_the_head(loaded, network)
    assert loaded.classifier[1].out_channels == 5
    same = torchvision_model(name="squeezenet1_1", output_size=7, input_shape=SMALL, weights=str(path))
    assert torch.equal(same.classifier[1].weight, network.classifier[1].weight)


def test_running_statistics_are_taken(tmp_path):
    network = torchvision_model(name="mnasnet0_5", output_size=5, input_shape=SMALL)
    network(torch.randn(4, *SMALL))
    torch.save(network.state_dict(), tmp_path / "state.pt")
    loaded = torchvision_model(name="mnasnet0_5", output_size=5, input_shape=SMALL, weights=str(tmp_path / "state.pt"))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())


def test_weights_of_another_network_are_refused(saved, tmp_path):
    _, path = saved
    with pytest.raises(ConfigurationError, match=r"features.0.weight \(64, 3, 3, 3\) instead of \(96, 3, 7, 7\)"):
        torchvision_model(name="squeezenet1_0", output_size=5, weights=str(path))
    with pytest.raises(ConfigurationError, match=r"instead of \(64, 1, 3, 3\).*data.resize=true"):
        torchvision_model(name="squeezenet1_1", output_size=5, input_shape=(1, 32, 32), weights=str(path))

    torch.save(torchvision_model(name="resnet18", output_size=5).state_dict(), tmp_path / "resnet18.pt")
    # ResNet-18's first blocks are ResNet-34's: what is absent has to be noticed, not only what differs.
    with pytest.raises(ConfigurationError, match=r"are missing: layer1.2.conv1.weight \(64, 64, 3, 3\).* more"):
        torchvision_model(name="resnet34", output_size=5, weights=str(tmp_path / "resnet18.pt"))
    with pytest.raises(ConfigurationError, match=r"are unknown to the network: bn1.weight \(64,\)"):
        torchvision_model(name="resnet18", output_size=5, affine=False, weights=str(tmp_path / "resnet18.pt"))


def test_files_without_weights_are_refused(tmp_path):
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"state_dict": {}}, tmp_path / "nested.pt")
    for file, match in (("damaged.pt", "cannot be read"), ("nested.pt", "not a state_dict")):
        with pytest.raises(DataError, match=match):
            torchvision_model(name="squeezenet1_1", output_size=5, weights=str(tmp_path / file))
    with pytest.raises(ConfigurationError, match="neither .*IMAGENET1K_V1.* nor a file"):
        torchvision_model(name="squeezenet1_1", output_size=5, weights="IMAGENET1K_V7")


def test_published_weights_come_from_torchvisions_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # what is there already is not downloaded
    published = torchvision_model(name="squeezenet1_1", output_size=1000)
    entry = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    path = tmp_path / "hub" / "checkpoints" / Path(entry.url).name
    path.parent.mkdir(parents=True)
    torch.save(published.state_dict(), path)
    assert_equal_but_for_the_head(torchvision_model(name="squeezenet1_1", output_size=5, weights="DEFAULT"), published)
    with pytest.raises(ConfigurationError, match=r"needs images of 3 channels.*\[1, 28, 28\].*data.resize=true"):
        torchvision_model(name="squeezenet1_1", output_size=5, input_shape=(1, 28, 28), weights="DEFAULT")


def test_a_download_that_fails_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))  # no folder can be made under a file
    with pytest.raises(DataError, match="network.weights=IMAGENET1K_V1 .*https://.*checkpoints"):
        torchvision_model(name="squeezenet1_1", output_size=5, weights="DEFAULT")


# timm.


@pytest.mark.parametrize(
    ("name", "input_shape", "options"),
    [
        ("resnet10t", (1, 8, 8), {}),
        ("vit_tiny_patch16_224", (3, 64, 32), {"depth": 2}),
        ("vit_tiny_patch16_224.augreg_in21k", (1, 8, 8), {"depth": 2, "patch_size": 4}),
    ],
)
def test_a_timm_model_trains(name, input_shape, options):
    pytest.importorskip("timm")
    network = timm_model(name=name, output_size=5, input_shape=input_shape, options=options)
    outputs = network.train()(torch.randn(2, *input_shape))
    assert outputs.shape == (2, 5)
    outputs.sum().backward()


def test_timm_takes_the_size_that_is_asked_for():
    pytest.importorskip("timm")
    options = {"depth": 1, "img_size": 32}
    network = timm_model(name="vit_tiny_patch16_224", output_size=5, options=options)
    assert network.patch_embed.num_patches == 4
    network = timm_model(name="vit_tiny_patch16_224", output_size=5, options={"depth": 1})
    assert network.patch_embed.num_patches == 14 * 14


def test_timm_refuses_what_it_cannot_build():
    pytest.importorskip("timm")
    with pytest.raises(ConfigurationError, match="network.name='resnet10tt'.*did you mean resnet10t"):
        timm_model(name="resnet10tt", output_size=5)
    with pytest.raises(ConfigurationError, match=r"\[3, 8, 8\] is smaller than one patch"):
        timm_model(name="vit_tiny_patch16_224", output_size=5, input_shape=(3, 8, 8), options={"depth": 1})
    for name, options, match in (
        ("resnet10t.no_such_tag", {}, "no_such_tag"),
        ("resnet10t", {"depth": 3}, "depth"),
        ("no-such-hub:model", {}, "no-such-hub"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            timm_model(name=name, output_size=5, options=options)


def test_timm_weights_that_cannot_be_read_name_the_remedy(tmp_path):
    pytest.importorskip("timm")
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "absent.pt")}}
    with pytest.raises(DataError, match="network.name=resnet10t.*network.pretrained=false"):
        timm_model(name="resnet10t", output_size=5, pretrained=True, options=options)


def test_timm_weights_from_a_file_are_adapted(tmp_path):
    pytest.importorskip("timm")
    network = timm_model(name="resnet10t", output_size=1000)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "state.pt")}}
    loaded = timm_model(name="resnet10t", output_size=5, input_shape=(1, 32, 32), pretrained=True, options=options)
    assert torch.equal(loaded.layer4[0].conv1.weight, network.layer4[0].conv1.weight)
    assert loaded.fc.out_features == 5


def test_without_timm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigurationError, match=r"needs the package timm.*supsup-lightning\[timm\]"):
        timm_model(name="resnet10t", output_size=5)


def test_a_network_that_views_what_a_convolution_returns_gets_images_as_they_are():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3, bias=False)
            self.head = nn.Linear(4 * 36, 10, bias=False)

        def forward(self, images):
            return self.head(self.convolution(images).view(len(images), -1))

    images = torch.randn(5, 3, 8, 8)
    for network, lays_out in ((Views(), False), (GEMResNet18(output_size=10, input_shape=(3, 8, 8)), True)):
        method = SupSup(network)
        method.begin_task(0)
        method(images, 0).sum().backward()
        assert method.base.laid_out(images).is_contiguous(memory_format=torch.channels_last) == lays_out
        assert network.training
    assert SupSup(nn.Linear(8, 4)).base.laid_out(images) is images
