"""Conventions that networks have: kept under every mask, or refused before training in one message."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from torchvision.models import DenseNet

from supsup_lightning import (
    GG,
    PSP,
    BatchEnsemble,
    Exhaustive,
    Given,
    HopSupSup,
    OneShot,
    PermutedDigits,
    SeparateHeads,
    SupSup,
    UpperBound,
)
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.native import select
from tests.conftest import fit, random_images


def base() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20))


def trained(network, *, folder, scenario=None, inference=None, tasks=2, method=SupSup, **options):
    data = PermutedDigits(num_tasks=tasks, steps_per_task=3, batch_size=16, **options)
    given = {"scenario": GG, "inference": Given()} if inference is None else {"inference": inference}
    module, trainer = fit(method(network), data, folder=folder, **given)
    return module, trainer, data


# Gradients through parts that run again in the backward pass.


class Checkpointed(nn.Module):
    """A hidden block in activation checkpointing, unless ``reentrant`` is None."""

    def __init__(self, reentrant, norm=True):
        super().__init__()
        self.first, self.head = nn.Linear(64, 32), nn.Linear(32, 20)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32) if norm else nn.Identity(), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, images):
        hidden = self.first(images.flatten(1)).relu()
        if self.reentrant is not None:
            return self.head(checkpoint(self.block, hidden, use_reentrant=self.reentrant))
        return self.head(self.block(hidden))


def gradient_and_statistics(make_method, network):
    method = make_method(network)
    method.begin_task(0)
    cross_entropy(method(random_images(8), 0), torch.arange(8)).backward()
    return method.trainable()[0].grad, getattr(method, "statistics", None), dict(network.state_dict())


@pytest.mark.parametrize("make_method", [SupSup, HopSupSup, BatchEnsemble, PSP, SeparateHeads, UpperBound])
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(make_method):
    results = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        network = Checkpointed(reentrant)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        gradient, statistics, after = gradient_and_statistics(make_method, network)
        assert all(torch.equal(after[name], before[name]) for name, _ in network.named_buffers())
        results.append((gradient, statistics))
    (right, right_statistics), (gradient, statistics) = results
    assert torch.equal(gradient, right)
    assert right_statistics is None or torch.equal(statistics, right_statistics)


def test_densenet_saves_memory_with_the_same_gradient():
    results = []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        network = DenseNet(4, (2, 2), 8, num_classes=4, memory_efficient=memory_efficient)
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        method = SupSup(network)
        method.begin_task(0)
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        cross_entropy(method(images, 0), torch.arange(8) % 4).backward()
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
        results.append(method.live.values.grad)
    assert torch.equal(*results)


def test_two_tasks_in_one_backward_pass_have_each_its_own_parameters():
    gradients = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        method = SupSup(Checkpointed(reentrant, norm=False))
        method.begin_task(0)
        method.finish_task(0)
        method.begin_task(1)
        images = random_images(4).requires_grad_()
        own = dict(method.network.named_parameters())
        (method(images, 1).square().sum() + method(images, 0).square().sum()).backward()
        assert all(own[name] is parameter for name, parameter in method.network.named_parameters())
        gradients.append((method.live.values.grad, images.grad))
    for right, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right)


def test_a_failed_backward_pass_leaves_the_network_its_own_parameters_for_the_next():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory, say")

    class Net(nn.Sequential):
        def forward(self, images):
            return super().forward(Fails.apply(images))

    network = Net(*base())
    own = dict(network.named_parameters())
    method = SupSup(network)
    method.begin_task(0)
    with pytest.raises(RuntimeError, match="say"):
        method(random_images(2).requires_grad_(), 0).sum().backward()
    method(random_images(2), 0)
    assert all(own[name] is parameter for name, parameter in network.named_parameters())


def test_layers_of_torch_that_a_user_changed_may_run_again():
    gradients = []
    for change in (False, True):
        torch.manual_seed(0)
        network = base()
        if change:
            network[1].forward = partial(checkpoint, network[1].forward, use_reentrant=False)
            network[3].register_forward_hook(
                lambda layer, inputs, output: checkpoint(torch.sin, output, use_reentrant=False)
            )
        else:
            network[3].register_forward_hook(lambda layer, inputs, output: output.sin())
        gradients.append(gradient_and_statistics(SupSup, network)[0])
    assert torch.equal(*gradients)


def test_reentrant_checkpointing_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="has to be use_reentrant=False"):
        trained(Checkpointed(True), folder=tmp_path)


def test_a_mask_that_no_gradient_reaches_is_refused(tmp_path):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head, self.use_checkpoint = nn.Linear(64, 32), nn.Linear(32, 20), True

        def forward(self, images):  # the images need no gradient, so that nothing in the block gets one
            return self.head(checkpoint(self.first, images.flatten(1), use_reentrant=True).relu())

    message = r"No gradient reaches first.weight .* mask.exclude=\[first.weight\].* switch off use_checkpoint"
    with pytest.raises(ConfigurationError, match=message):
        trained(First(), folder=tmp_path)


def test_gradients_of_a_superposition_and_of_tasks_at_once_are_refused_where_parts_run_again(tmp_path):
    with pytest.raises(ConfigurationError, match="gradient of a superposition .* inference=exhaustive"):
        trained(Checkpointed(False), folder=tmp_path, inference=OneShot("entropy", images="batch"))
    with pytest.raises(ConfigurationError, match="nor can activation checkpointing; use data.tasks_at_once=1"):
        trained(Checkpointed(False), folder=tmp_path, tasks_at_once=2)
    trained(Checkpointed(False), folder=tmp_path, inference=Exhaustive("entropy", images="batch"))


# What layers ask of their weights.


class Words(nn.Module):
    """Embeddings of 17 words; with a batch of images, their brightness is the word."""

    def __init__(self, **options):
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, 8, **options), nn.Linear(8, 20)

    def forward(self, words):
        if words.is_floating_point():
            words = (words * 2).long().clamp(0, 16).flatten(1)
        return self.head(self.embedding(words).sum(1))


@pytest.mark.parametrize("make_method", [SupSup, BatchEnsemble, PSP, UpperBound])
def test_padding_adds_nothing_under_any_mask(make_method):
    torch.manual_seed(0)
    method = make_method(Words(padding_idx=0))
    words = torch.randint(1, 17, (3, 6), generator=torch.Generator().manual_seed(0))
    for task in range(2):
        method.begin_task(task)
        optimizer = torch.optim.SGD(method.trainable(), lr=0.1)
        cross_entropy(method(pad(words, (0, 2)), task), torch.arange(3)).backward()
        optimizer.step()
        method.finish_task(task)
        assert not method.effective(task)["embedding.weight"][0].any()
        torch.testing.assert_close(method(words, task), method(pad(words, (0, 9)), task))
    if isinstance(method, SupSup):
        assert not method.superposed()["embedding.weight"][0].any()


def test_embeddings_with_sparse_gradients_or_bounded_norms_are_trained(tmp_path):
    gradients = []
    for options in ({}, {"sparse": True}, {"max_norm": 0.5}):
        torch.manual_seed(0)
        network = Words(**options)
        own = network.embedding.weight.detach().clone()
        method = SupSup(network, weights="keep")
        method.begin_task(0)
        cross_entropy(method(torch.arange(6).view(3, 2), 0), torch.arange(3)).backward()
        assert torch.equal(network.embedding.weight, own)
        gradients.append(method.live.values.grad)
        trained(Words(**options), folder=tmp_path, inference=OneShot("entropy", images="batch"))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_instance_normalisation_in_a_superposition_is_by_image(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), nn.Linear(144, 20)
    )
    module, _, _ = trained(network, folder=tmp_path, inference=OneShot("entropy", images="batch"))
    assert module.infer(random_images(4))[0].shape == (4,)
    method, images = module.method.eval(), random_images(3)
    weights = method.superposed()
    together = method.base.call_superposed(weights, images)
    torch.testing.assert_close(together[:1], method.base.call_superposed(weights, images[:1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "whose shapes are not known yet"),
        (lambda: torch.jit.script(base()), "is scripted, .* give the module that it was made of"),
        (lambda: nn.Sequential(torch.jit.script(base())), "in 0, is scripted"),
        (lambda: nn.DataParallel(base()), r"wrapped in DataParallel, .*its \.module"),
        (lambda: nn.ParameterList([torch.zeros(3, 2, dtype=torch.cfloat)]), "0 is complex, .*view_as_real"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to("meta"), "without values, on the device meta"),
    ],
    ids=["lazy", "scripted", "part scripted", "DataParallel", "complex", "meta"],
)
@pytest.mark.parametrize("make_method", [SupSup, BatchEnsemble, SeparateHeads, UpperBound])
def test_networks_whose_parameters_cannot_be_replaced_are_refused_at_once(make, message, make_method):
    network = make()
    with pytest.raises(ConfigurationError, match=message):
        make_method(network)


def test_parameters_that_are_no_weights_are_not_masked():
    network = base()
    network.table = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)
    method = SupSup(network)
    assert "table" not in method.layout.names
    assert torch.equal(network.table, torch.arange(6).view(2, 3))


def test_spectral_normalisation_is_refused_before_training(tmp_path):
    network = base()
    nn.utils.parametrizations.spectral_norm(network[1])
    with pytest.raises(ConfigurationError, match="changed the network's buffer .*_u"):
        trained(network, folder=tmp_path)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
    ],
    ids=["old weight norm", "weight norm", "pruned"],
)
def test_layers_that_compute_their_weight_are_trained(wrap, tmp_path):
    import torch.nn.utils.prune

    torch.manual_seed(0)
    network = base()
    wrap(network[1])
    module, _, _ = trained(network, folder=tmp_path)
    changed = {
        name: not torch.equal(part, module.method.layout.split(module.method._drawn_scores(0) >= 0)[name])
        for name, part in module.method.layout.split(module.method.bank.get(0)).items()
    }
    assert sum(changed.values()) >= 2


# Types.


def test_parameters_keep_their_types(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Linear(64, 32).bfloat16(), nn.BatchNorm1d(32).bfloat16()
            self.head = nn.Linear(32, 20)

        def forward(self, images):
            return self.head(self.norm(self.body(images.flatten(1).bfloat16())).float())

    module, _, _ = trained(Mixed(), folder=tmp_path)
    method = module.method
    assert method.network.body.weight.dtype == torch.bfloat16
    assert method.live.values.dtype == method.frozen.dtype == torch.float32
    assert method.bank.statistics[0].abs().sum() > 0
    assert not torch.equal(
        method.bank.statistics[0], method.base.fresh_statistics()
    )  # updated through copies in bfloat16


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_precision_of_the_network_leaves_scores_and_masks_exact(precision, tmp_path):
    import lightning as L

    from supsup_lightning import ContinualModule

    data = PermutedDigits(num_tasks=2, steps_per_task=20)
    torch.manual_seed(0)
    method = SupSup(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)))
    frozen = method.frozen.clone()
    module = ContinualModule(method, scenario=GG, inference=Given(), optimizer=partial(torch.optim.Adam, lr=0.02))
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        callbacks=module.task_callbacks(data),
        max_epochs=data.num_epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    assert trainer.test(module, data, verbose=False)[0]["test/accuracy"] > 0.3
    assert method.live.values.dtype == method.frozen.dtype == method.live.statistics.dtype == torch.float32
    assert method.network[1].weight.dtype != torch.float32
    assert torch.equal(method.frozen, frozen)
    method.load_state_dict(method.state_dict())
    assert torch.equal(method.frozen, frozen)
    method.save(tmp_path / "bank.safetensors")
    torch.manual_seed(0)
    fresh = SupSup(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)))
    fresh.load(tmp_path / "bank.safetensors")
    assert torch.equal(fresh.bank.packed, method.bank.packed)


def test_half_precision_finds_no_tasks(tmp_path):
    trained(base().half(), folder=tmp_path)
    with pytest.raises(ConfigurationError, match="half precision, .*precision=bf16-mixed .*, or scenario=gg"):
        trained(base().half(), folder=tmp_path, inference=OneShot("entropy"))


def test_kernels_do_not_depend_on_the_default_type():
    packed, vector = torch.tensor([[5]], dtype=torch.uint8), torch.arange(8.0)
    drawn = SupSup(base()).frozen
    for other in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(other)
        try:
            assert select(packed, vector).dtype == torch.float32
            method = SupSup(base())
            assert method.live.values.dtype == torch.float32
            assert torch.equal(method.frozen.sign(), drawn.sign())
        finally:
            torch.set_default_dtype(torch.float32)


# Layers and tensors in several places.


@pytest.mark.parametrize("make_method", [SupSup, BatchEnsemble, SeparateHeads, UpperBound])
def test_a_layer_that_is_used_twice_keeps_its_own_weights(make_method):
    twice = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), twice, nn.ReLU(), twice, nn.Linear(32, 20))
    method = make_method(network)
    own = {name: (value, value.clone()) for name, value in network.state_dict(keep_vars=True).items()}
    for task in range(2):
        method.begin_task(task)
        cross_entropy(method(random_images(8), task), torch.arange(8)).backward()
        method.finish_task(task)
    method.load_state_dict(method.state_dict())
    for name, value in network.state_dict(keep_vars=True).items():
        assert value is own[name][0]
        assert torch.equal(value, own[name][1])


def test_a_decoder_tied_to_an_embedding_with_bounded_norms_is_masked_with_it(tmp_path):
    network = Words(max_norm=0.5, padding_idx=0)
    network.head = nn.Linear(8, 17, bias=False)
    network.head.weight = network.embedding.weight
    weight = network.embedding.weight
    module, _, _ = trained(network, folder=tmp_path)
    assert module.method.layout.names == ("embedding.weight",)
    assert network.head.weight is network.embedding.weight is weight
    norms = module.method.frozen.view(17, 8).norm(dim=1)
    assert (norms[1:] > 0.5).all()  # the network's own, which no trial has rescaled
    assert torch.equal(weight.flatten(), module.method.frozen)


# Outputs, and what a forward pass makes.


class Returns(nn.Linear):
    """What ``change`` makes of the logits in training or not."""

    def __init__(self, change):
        super().__init__(64, 20)
        self.change = change

    def forward(self, images):
        return self.change(super().forward(images.flatten(1)), self.training)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, training: logits.long(), r"got \(2, 20\) torch.int64 in training"),
        (lambda logits, training: logits if training else logits[:, :10], r"got \(2, 10\) .* in evaluation"),
        (lambda logits, training: {"logits": logits}, "got dict in training"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(change, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        trained(Returns(change), folder=tmp_path)


class Late(nn.Module):
    """Makes a layer, or a buffer, when it is first called."""

    def __init__(self, make):
        super().__init__()
        self.make, self.head = make, nn.Linear(64, 20)

    def forward(self, images):
        if not hasattr(self, "late"):
            self.make(self)
        return self.head(images.flatten(1) * self.late)


def test_parameters_that_a_forward_pass_makes_are_refused_and_left_out(tmp_path):
    network = Late(lambda network: network.register_parameter("late", nn.Parameter(torch.ones(64))))
    with pytest.raises(ConfigurationError, match=r"makes late in its forward pass.* pass a batch through"):
        trained(network, folder=tmp_path)
    assert not hasattr(network, "late")
    network(random_images(2))
    trained(network, folder=tmp_path)


def test_a_buffer_that_a_forward_pass_makes_may_stay_if_it_is_not_stored(tmp_path):
    trained(Late(lambda network: network.register_buffer("late", torch.ones(64), persistent=False)), folder=tmp_path)


class Centred(nn.Module):
    """Keeps a running mean in a parameter, which is no mask's."""

    def __init__(self):
        super().__init__()
        self.head, self.mean = nn.Linear(64, 20), nn.Parameter(torch.zeros(64), requires_grad=False)

    def forward(self, images):
        images = images.flatten(1)
        if self.training:
            self.mean.data = 0.9 * self.mean + 0.1 * images.mean(0)
        return self.head(images - self.mean)


def test_parameters_that_keep_state_are_refused(tmp_path):
    network = Centred()
    with pytest.raises(ConfigurationError, match="changes its own mean in its forward pass"):
        trained(network, folder=tmp_path)
    assert not network.mean.any()


# State beside parameters and buffers.


class Stateful(nn.Module):
    """Counts training steps, and answers differently from the given one on."""

    def __init__(self, first):
        super().__init__()
        self.layer, self.steps, self.first, self.log = nn.Linear(64, 20), 0, first, []

    def forward(self, images):
        self.steps += self.training
        self.log.append(len(images))
        return self.layer(images.flatten(1)) * (2 if self.steps >= self.first else 1)


@pytest.mark.parametrize(("first", "where"), [(3, "in the attributes steps, log"), (7, "outside of parameters")])
def test_state_that_changes_a_finished_tasks_answers_is_noticed(first, where, tmp_path):
    with pytest.raises(ConfigurationError, match=f"keeps state {where}"):
        trained(Stateful(first), folder=tmp_path, tasks=3)


def test_harmless_state_is_left_as_it_was(tmp_path):
    network = Stateful(10**9)
    trained(network, folder=tmp_path, tasks=1)
    assert network.steps == 3  # those of training alone


def test_the_trial_draws_nothing(tmp_path):
    from supsup_lightning import ContinualModule
    from supsup_lightning.checks import network_trial

    module = ContinualModule(SupSup(nn.Sequential(*base(), nn.Dropout(0.5))), inference=OneShot("entropy"))
    before = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    random_state = torch.get_rng_state()
    network_trial.try_tasks(module.method, module.inference, random_images(2), num_classes=10)
    assert torch.equal(torch.get_rng_state(), random_state)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not module.method.live.tasks
    assert not len(module.method.bank)


# A user's own inference.


class Own(OneShot):
    def __init__(self, change):
        super().__init__("entropy", images="batch")
        self.change = change

    def predict(self, method, images, num_classes):
        return self.change(*super().predict(method, images, num_classes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks, logits: (tasks[:1], logits), r"it returned \(1,\) torch.int64"),
        (lambda tasks, logits: (tasks.float(), logits), r"it returned \(2,\) torch.float32"),
        (lambda tasks, logits: (tasks + 5, logits), "task 5, where .* are finished"),
        (lambda tasks, logits: (tasks, logits[:, 0]), r"and \(2,\) torch.float32"),
        (lambda tasks, logits: tasks, "it returned Tensor"),
        (lambda tasks, logits: tasks.nothing, "failed when it was tried .* 'nothing'"),
    ],
    ids=["shape", "type", "unknown", "logits", "tasks alone", "raises"],
)
def test_a_wrong_inference_is_noticed_before_training(change, message, tmp_path):
    with pytest.raises(ConfigurationError, match=f"Own.*{message}"):
        trained(base(), folder=tmp_path, inference=Own(change))
