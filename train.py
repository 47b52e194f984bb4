"""Train a captioner, validate it on captions made by beam search, and keep the best.

python train.py
python train.py --preset shapes
python train.py --encoder vgg16 --decoder gru --output_folder vgg16_gru
python train.py --scheduled_sampling inverse_sigmoid --output_folder scheduled
python train.py --resume
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if sys.flags.safe_path:
    sys.exit("train.py: error: unset PYTHONSAFEPATH, which hides this suite's files")
import utils
from utils import UserError

# loaded when first used: --help and a mistake in a flag need not wait for them
np, torch, datasets, models = map(utils.LazyModule, ("numpy", "torch", "datasets", "models"))


def train(trainer, args):
    """The training: epochs, batches, validation, checkpoints.

    :param trainer: ``Trainer``, from :func:`prepare`: the model, and where its training stands
    """
    model, optimizer, history = trainer.model, trainer.optimizer, trainer.history

    def train_step(batch, epsilon):
        with utils.autocast(trainer.device, args.amp):
            images = trainer.encoder_input(batch)
            captions, lengths, image_index = batch.captions, batch.decode_lengths, batch.image_index
            output = model(images, captions, lengths, image_index, epsilon, args.ss_argmax)
        loss, nll = trainer.loss(output, batch)
        optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel averages the gradients, but the processes' losses add up
        (loss * utils.world_size()).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainer.parameters, args.grad_clip)
        # the fused optimizer changes nothing where found_inf is 1: nobody waits for the GPU
        optimizer.found_inf, optimizer.grad_scale = 1 - norm.isfinite().float(), None
        optimizer.step()
        trainer.count(loss.detach(), nll, batch)

    step = CudaGraphStep(train_step, trainer) if trainer.use_graphs else train_step
    while len(history) < args.epochs and epochs_without_gain(history, args.metric) < args.patience:
        # self-critical training samples without dropout, so it trains without, too
        trainer.captioner.decoder.train(not args.scst)
        for batch in trainer.batches():
            with trainer.stop.held():  # a signal to stop takes effect between two updates
                factor = learning_rate_factor(trainer.config, trainer.update, history)
                for group in optimizer.param_groups:
                    group["lr"].fill_(group["peak_lr"] * factor)
                utils.set_seed(args.seed, trainer.update, utils.rank())
                batch = trainer.sample_and_reward(batch) if args.scst else batch
                step(batch.to(trainer.device), trainer.epsilon(trainer.update))
                trainer.advance(batch)
                if args.checkpoint_every and trainer.update % args.checkpoint_every == 0:
                    trainer.save(trainer.latest_path)
            trainer.stop.check()
        record = trainer.epoch_record()
        scores, hypotheses = validate(trainer, args)
        record |= scores | {"seconds": round(time.time() - trainer.started, 1)}
        is_best = record[args.metric] > best_score(history, args.metric)
        with trainer.stop.held():
            history.append(record)
            trainer.begin_epoch()
            if is_best:  # saved first: killed in between, the run repeats the epoch and ends alike
                trainer.save(trainer.best_path)
            trainer.save(trainer.latest_path)
            write_reports(trainer, args)
            write_tensorboard(trainer, args, record)
            print_epoch(record, args, is_best, trainer.val_data, hypotheses)


def validate(trainer, args):
    """Scores of captions made by beam search, and teacher-forced loss, on the validation split.

    :return: (dict of metrics and ``val_nll``, list of captions as lists of words)
    """
    data, captioner, share = trainer.val_data, trainer.captioner, utils.share(len(trainer.val_data))
    captioner.decoder.eval()
    utils.set_seed(args.seed, trainer.update)  # of locations that hard attention samples
    with utils.autocast(trainer.device, args.amp):
        if trainer.val_features is None:  # the CNN has changed
            features = captioner.features(data, args.data_folder, share, args.workers)
        else:
            features = trainer.val_features[share]
        nll = teacher_forced_nll(captioner.decoder, data, features, share)
        options = utils.search_options(args) | {"beam_size": args.beam_size}
        found = models.caption_split([captioner], [features], with_alphas=False, **options)
    hypotheses = sum(utils.all_gather([captioner.text(best) for best, *_ in found]), [])
    scores = utils.is_main() and utils.score_captions(data.references, hypotheses)
    return utils.broadcast(scores) | {"val_nll": nll}, hypotheses


def teacher_forced_nll(decoder, data, features, share, batch_size=64):
    """Cross-entropy per word of a split's true captions, each word predicted from those before it.

    :param features: float (n, num_pixels, encoder_dim), of this process's share of the images
    """
    device, nll, words = next(decoder.parameters()).device, 0.0, 0
    numbers = np.arange(len(data))[share]
    for i in range(0, len(numbers), batch_size):
        captions, lengths, image_index = datasets.collate(data, numbers[i : i + batch_size])
        captions, image_index = torch.from_numpy(captions), torch.from_numpy(image_index)
        with torch.no_grad():
            encoder_out = features[i : i + batch_size].to(device)  # (num_images, n, encoder_dim)
            output = decoder(encoder_out, captions.to(device), lengths, image_index.to(device))
            nll += models.caption_loss(output, num_words=1, alpha_c=0)[1].item()
        words += sum(lengths)
    nll, words = np.sum(utils.all_gather((nll, words)), axis=0)
    return float(nll / words)


class Batch(NamedTuple):
    """One process's share of an update."""

    numbers: Any  # int64 (num_images,), numpy: the images' numbers in the split
    # uint8 images (num_images, 3, S, S), if the CNN is trained too; if it is frozen its features,
    # float16 (num_images, n, encoder_dim), or their numbers, int64, if all are on the GPU
    inputs: Any
    captions: Any  # int64 (B, max_decode_length + 1)
    decode_lengths: list  # of B ints
    image_index: Any  # int64 (B,): each caption's image in this batch
    num_words: Any  # float32 (), words of all processes' shares
    advantages: Any = None  # float32 (B,), of sampled captions
    reward: Any = None  # float32 (), of sampled captions, mean over all processes' shares

    def tensors(self, device):
        """The batch with its arrays as tensors, in memory that a GPU can fetch from by itself."""
        fields = set(self._fields) - {"numbers", "decode_lengths"}
        arrays = {key: getattr(self, key) for key in fields if getattr(self, key) is not None}
        pin = torch.Tensor.pin_memory if device.type == "cuda" else torch.as_tensor
        return self._replace(**{key: pin(torch.as_tensor(a)) for key, a in arrays.items()})

    def to(self, device):
        """The batch with its tensors on a device."""
        tensors = {key: x for key, x in self._asdict().items() if torch.is_tensor(x)}
        return self._replace(**{k: x.to(device, non_blocking=True) for k, x in tensors.items()})


# ---------------------------------------------------------------- beyond the main path


class Trainer:
    """What a training needs at every update, and where it stands.

    Nothing is drawn that does not follow from seed, update and process, so that a run can go on
    where it was stopped. With several processes each takes its share of a batch's images.
    """

    def __init__(self, args, captioner, train_data, val_data, stop):
        self.args, self.captioner, self.stop = args, captioner, stop
        self.config = captioner.config
        self.train_data, self.val_data, self.device = train_data, val_data, captioner.device
        self.latest_path = datasets.checkpoint_path(args.output_folder, args.data_name)
        self.best_path = datasets.checkpoint_path(args.output_folder, args.data_name, best=True)
        self.features = self.val_features = self.progress = self.teacher = None
        # self-critical training has no true words to teach, and NoAttention nothing to learn
        if args.grounding and not args.scst and list(captioner.decoder.attention.parameters()):
            sizes = captioner.encoder.encoder_dim, len(captioner.word_map)
            self.teacher = models.AttentionTeacher(*sizes).to(self.device)
        self.optimizer = build_optimizer(args, captioner, self.teacher)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        encoder = captioner.encoder if args.fine_tune_encoder else None
        self.model = models.CaptioningNetwork(encoder, captioner.decoder, self.teacher)
        if utils.world_size() > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
        self.use_graphs = self.device.type == "cuda" and utils.world_size() == 1
        self.history, self.update, self.started = [], 0, time.time()
        # sums over the epoch, kept on the device: asking for them would make the host wait
        self.total = torch.zeros(3, device=self.device)  # loss, nll, updates
        self.skipped = torch.zeros(2, device=self.device)  # not finite: all of them, last in a row
        self.begin_epoch()
        if args.scst:
            self.reward = utils.CiderD(train_data.references)
            banned = datasets.special_tokens(captioner.word_map)
            self.banned = torch.tensor(banned, device=self.device)

    def begin_epoch(self):
        """Reset the epoch's sums."""
        self.total.zero_()
        self.skipped.zero_()
        self.words, self.seconds, self.warned = 0, 0.0, 0

    def encoder_input(self, batch):
        """What the network takes: images for a CNN that is trained, else features."""
        on_gpu = self.features is not None and self.features.is_cuda
        return self.features[batch.inputs] if on_gpu else batch.inputs

    def loss(self, output, batch):
        """(loss, nll) of a share, each divided by the words of the whole batch."""
        args = self.args
        if output is None:  # the last batch has fewer images than there are processes
            zero = sum(p.sum() for p in self.parameters if p.requires_grad) * 0
            return zero, torch.zeros((), device=self.device)
        if args.scst:
            return models.self_critical_loss(output, batch.advantages, self.banned, batch.num_words)
        return models.caption_loss(
            output, batch.num_words, args.label_smoothing, args.alpha_c, grounding=args.grounding,
            decoder=self.captioner.decoder,
        )  # fmt: skip

    def epsilon(self, update):
        """Probability of feeding the true word at an update."""
        args, updates = self.args, self.config["total_updates"]
        schedule = models.Schedule(updates, args.ss_min, args.ss_k, args.ss_slope)
        return models.scheduled_sampling_epsilon(args.scheduled_sampling, update, schedule)

    def batches(self):
        """The epoch's batches, or what is left of them, loaded ahead in threads; shows progress."""
        epoch, args, mirrored = len(self.history), self.args, None
        order = datasets.training_batches(self.train_data, args.batch_size, args.seed, epoch)
        if args.mirror:  # half of the images whose captions stay true
            coins = np.random.default_rng([args.seed, epoch, 1]).random(len(self.train_data)) < 0.5
            mirrored = coins & datasets.mirrorable(self.train_data, self.captioner.word_map)
        done = self.update - epoch * len(order)
        self.epoch_began = time.time() - self.seconds
        bar = utils.progress(
            total=len(order), initial=done, desc=f"epoch {epoch + 1}/{args.epochs}", unit="batch",
            leave=False,
        )  # fmt: skip
        with bar as self.progress:
            load = lambda numbers: self.load(numbers, mirrored)
            yield from datasets.read_ahead(load, order[done:], args.workers)
        self.check()

    def load(self, numbers, mirrored):
        """What an update needs of its images, on the CPU; runs in threads.

        :param numbers: int array, the images of all processes
        :param mirrored: bool array (N,), which of all images to show mirrored; or None
        :return: ``Batch`` of this process's share
        """
        num_words = datasets.count_words(self.train_data, numbers)
        numbers = numbers[utils.rank() :: utils.world_size()]
        captions, lengths, image_index = datasets.collate(self.train_data, numbers)
        if self.features is None:
            inputs = self.train_data.images(numbers)
            if mirrored is not None:
                inputs[mirrored[numbers]] = inputs[mirrored[numbers], ..., ::-1]
        elif self.features.is_cuda:
            inputs = numbers
        else:  # by numpy: torch in a thread starts OpenMP threads that fight for the cores
            inputs = self.features.numpy().take(numbers, axis=0)
        batch = Batch(numbers, inputs, captions, lengths, image_index, np.float32(num_words))
        return batch.tensors(self.device)

    def count(self, loss, nll, batch):
        """Add an update to the epoch's sums. With ``--scst`` the loss is minus the reward."""
        bad = self.optimizer.found_inf
        loss = -batch.reward if self.args.scst else loss
        sums = torch.stack([loss, nll, torch.full_like(bad, 1 / utils.world_size())])
        self.total += torch.where(bad > 0, 0, sums)
        self.skipped.copy_(torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad]))

    def advance(self, batch):
        """One update more: counters, progress bar, and now and then a look at the losses."""
        self.words += int(batch.num_words)
        self.update += 1
        self.seconds = time.time() - self.epoch_began
        self.progress.update()
        if self.device.type == "cpu" or self.update % 25 == 0:
            self.check()
        if self.update % 25 == 0:
            loss, _, count = self.total.tolist()
            rate = self.words / max(self.seconds, 1e-9)
            text = f"loss {loss / max(count, 1e-9):.3f}, {rate:,.0f} words/s"
            self.progress.set_postfix_str(text)

    def check(self):
        """Warn of updates that were left out as their gradient was not finite.

        :raises UserError: if there were many in a row
        """
        count, in_a_row = self.skipped.tolist()
        if in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"the loss was not finite in the last {in_a_row:.0f} updates: lower "
                "--learning_rate or --grad_clip, or leave out --amp; the last checkpoint is kept"
            )
        if count > self.warned:
            text = f"{count:.0f} updates of this epoch were left out"
            utils.note(f"update {self.update}: the loss was not finite; {text}")
            self.warned = count

    def epoch_record(self):
        """What the log says of the epoch: losses, rates, words per second."""
        loss, nll, count = utils.all_reduce_sum(self.total.clone()).tolist()
        last = self.update - 1
        factor = learning_rate_factor(self.config, last, self.history)
        return {
            "epoch": len(self.history) + 1, "update": self.update,
            "loss": loss / max(count, 1), "nll": nll / max(count, 1),
            "skipped_updates": int(self.skipped[0]),
            "learning_rate": self.args.learning_rate * factor, "epsilon": self.epsilon(last),
            "train_seconds": round(self.seconds, 1),
            "words_per_second": round(self.words / max(self.seconds, 1e-9)),
            "peak_memory_gb": utils.peak_memory_gb(self.device),
        }  # fmt: skip

    def save(self, path):
        """Save the model and where its training stands; all processes must ask at the same time."""
        captioner, total = self.captioner, utils.all_reduce_sum(self.total.clone()).cpu()
        state = {
            "config": self.config, "word_map": captioner.word_map, "history": self.history,
            "encoder": captioner.encoder.state_dict(), "decoder": captioner.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(), "update": self.update,
            "seconds": time.time() - self.started,
            "epoch_so_far": {"total": total, "skipped": self.skipped.cpu(), "words": self.words,
                             "seconds": self.seconds},
        }  # fmt: skip
        if self.teacher:
            state["teacher"] = self.teacher.state_dict()
        with self.stop.held():
            if utils.is_main():
                models.save_checkpoint(path, state)

    def resume(self, checkpoint, path):
        """Put the training back to where a checkpoint was saved.

        :raises UserError: if it is damaged
        """
        try:
            own = [{"lr": group["lr"], "capturable": group["capturable"]}
                   for group in self.optimizer.param_groups]  # fmt: skip
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            for group, kept in zip(self.optimizer.param_groups, own):
                kept["lr"].fill_(float(group["lr"]))
                group.update(kept)  # what belongs to the device, which may be another one now
            self.history, self.update = checkpoint["history"], int(checkpoint["update"])
            self.started -= float(checkpoint["seconds"])  # what the run took before counts, too
            so_far = checkpoint["epoch_so_far"]
            self.total.copy_(so_far["total"] * utils.is_main())  # the others' shares are in it
            self.skipped.copy_(so_far["skipped"])
            self.words, self.seconds = so_far["words"], so_far["seconds"]
            best = best_score(self.history, self.args.metric)
            per_epoch = math.ceil(len(self.train_data) / self.args.batch_size)
            if not 0 <= self.update - len(self.history) * per_epoch <= per_epoch:
                raise ValueError(f"{self.update} updates in {len(self.history)} epochs")
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {str(error)[:160]}): it cannot be "
                "resumed; start a new run from its weights with --init_from"
            ) from error
        so_far = f"; best {self.args.metric} so far {best:.2f}" if self.history else ""
        print(f"resuming after epoch {len(self.history)}, update {self.update}{so_far}")

    def sample_and_reward(self, batch, samples=5):
        """Sample captions, and reward each by how much it beats the others of its image.

        Rennie et al. 2017 compare with the greedy caption, which costs a search. The mean of the
        other samples costs nothing, and the advantages add up to zero (Luo 2020, "A better variant
        of self-critical sequence training").

        :return: ``Batch`` of the sampled captions, longest first
        """
        captioner, count = self.captioner, len(batch.numbers)
        captions = np.zeros((0, 1), np.int64)
        if count:
            with torch.no_grad(), utils.autocast(self.device, self.args.amp):
                images = self.encoder_input(batch.to(self.device))
                encoder_out = captioner.encoder(images) if self.features is None else images
                captions = models.sample_captions(
                    captioner.decoder, encoder_out, captioner.word_map, samples,
                    self.args.max_decode_steps,
                )  # fmt: skip
            captions = captions.flatten(0, 1).cpu().numpy()  # (num_images * samples, steps)
        end = captioner.word_map[datasets.END]
        rewards = [
            self.reward(image, datasets.decode_caption(caption, captioner.words), end in caption)
            for image, caption in zip(batch.numbers.repeat(samples), captions)
        ]
        rewards = np.array(rewards, np.float32)
        means = rewards.reshape(-1, samples).mean(axis=1).repeat(samples)
        advantages = (rewards - means) * samples / (samples - 1)  # from the mean of the others
        lengths = (captions != datasets.PAD_ID).sum(axis=1)
        order = np.argsort(-lengths, kind="stable")
        starts = np.full((len(captions), 1), captioner.word_map[datasets.START])
        captions = np.concatenate([starts, captions], axis=1)[order, : lengths.max(initial=0) + 1]
        sums = utils.all_gather([lengths.sum(), len(captions), rewards.sum()])
        words, number, reward = np.sum(sums, axis=0, dtype=np.float32)
        return batch._replace(
            captions=captions, decode_lengths=lengths[order].tolist(), num_words=words,
            image_index=np.arange(count).repeat(samples)[order],
            advantages=advantages[order].astype(np.float32), reward=100 * reward / number,
        ).tensors(self.device)  # fmt: skip


class CudaGraphStep:
    """A training step, recorded as a CUDA graph for each shape of its batch and replayed at once.

    The decoder's loop is hundreds of kernels too small to keep a GPU busy. A graph has fixed
    shapes: captions are padded to a multiple of four words, the batch to a multiple of sixteen
    captions (which say nothing), and at most ``MAX_GRAPHS`` graphs are kept; other shapes run
    without. The first step of a shape runs without, too: it sets up what a recording must find.
    """

    MAX_GRAPHS = 32

    def __init__(self, step, trainer):
        self.step, self.device, self.graphs = step, trainer.device, {}
        self.epsilon = torch.ones((), device=self.device)
        self.sampling = trainer.args.scheduled_sampling != "none"
        self.stream = torch.cuda.Stream(self.device)

    def __call__(self, batch, epsilon):
        batch = self.padded(batch)
        if self.sampling:
            epsilon = self.epsilon.fill_(epsilon)
        tensors = {name: t for name, t in batch._asdict().items() if torch.is_tensor(t)}
        key = tuple((name, *t.shape) for name, t in tensors.items())
        if key not in self.graphs:
            self.graphs[key] = None
            # recording refuses what autograd began on the default stream
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.step(batch, epsilon)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return
        if self.graphs[key] is None:
            if sum(made is not None for made in self.graphs.values()) >= self.MAX_GRAPHS:
                self.step(batch, epsilon)
                return
            self.graphs[key] = self.record(batch, tensors, epsilon)
        graph, static = self.graphs[key]
        for name, tensor in tensors.items():
            static[name].copy_(tensor, non_blocking=True)
        graph.replay()

    def record(self, batch, tensors, epsilon):
        """Record a step; return (graph, the tensors that it reads)."""
        static = {name: tensor.clone() for name, tensor in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        pool = next((made[0].pool() for made in self.graphs.values() if made), None)
        options = {"pool": pool, "stream": self.stream}
        # thread_local: the threads that load ahead go on pinning memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            self.step(batch._replace(**static), epsilon)
        return graph, static

    @staticmethod
    def padded(batch):
        """The batch in one of a few shapes; what is added counts in no loss."""
        steps = 4 * math.ceil(batch.decode_lengths[0] / 4)
        more = -len(batch.captions) % 16
        wider = steps + 1 - batch.captions.shape[1]
        pad, advantages = torch.nn.functional.pad, batch.advantages
        return batch._replace(
            captions=pad(batch.captions, (0, wider, 0, more), value=datasets.PAD_ID),
            decode_lengths=[steps] * (len(batch.captions) + more),
            image_index=pad(batch.image_index, (0, more)),
            advantages=None if advantages is None else pad(advantages, (0, more)),
        )


# ------------------------------------------------------------------------------------ preparation


def main(args):
    check_args(args)
    with contextlib.ExitStack() as stack:  # of what the run holds until its end: lock, processes
        trainer, args = prepare(args, stack)
        try:
            train(trainer, args)
        except utils.Stopped as signal:
            trainer.save(trainer.latest_path)
            how = "saved. The same command with --resume goes on"
            signal.args = (f"{signal} after update {trainer.update}; {how}",)
            raise
        best = max(trainer.history, key=lambda record: record[args.metric])
        print(
            f"best {args.metric} {best[args.metric]:.2f} in epoch {best['epoch']} of "
            f"{len(trainer.history)}, {best['seconds']:.0f} s after the start; peak memory "
            f"{utils.peak_memory_gb(trainer.device)} GB: {trainer.best_path}"
        )


def prepare(args, stack):
    """Data, model, optimizer and features of a run, new or to go on with.

    :param stack: ``contextlib.ExitStack`` for what the run holds until its end
    :return: (``Trainer``, the flags with the architecture that a checkpoint brought)
    """
    device = stack.enter_context(utils.processes(args.device))
    stop = stack.enter_context(utils.StopSignals())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    train_data, val_data = (
        datasets.CaptionDataset(datasets.split_path(args.data_folder, split, args.data_name))
        for split in ("train", "val")
    )
    word_map = datasets.load_word_map(datasets.word_map_path(args.data_folder, args.data_name))
    for data in (train_data, val_data):
        data.check_word_map(word_map)
    if len(val_data) == 1 and args.metric == "CIDEr":
        raise UserError("--metric CIDEr is always 0 for a single image; take BLEU-4, for example")
    path, checkpoint, resuming = load_run(args, word_map)
    args = with_architecture(args, checkpoint, path, resuming)
    check_sizes(train_data, val_data, checkpoint if resuming else None)
    utils.set_seed(args.seed)
    encoder, decoder = build_model(args, checkpoint, word_map, train_data, device)
    decoder.sample_location = args.sample_location
    config = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    config["total_updates"] = args.epochs * math.ceil(len(train_data) / args.batch_size)
    config |= {"encoder_dim": encoder.encoder_dim, "image_size": train_data.image_size}
    config["machine"] = utils.describe_machine(device)
    captioner = models.Captioner(encoder, decoder, word_map, config)
    latest_path = datasets.checkpoint_path(args.output_folder, args.data_name)
    stack.enter_context(utils.locked(datasets.lock_path(latest_path), latest_path))
    check_space(args, captioner)
    print_header(args, captioner, train_data, val_data)
    trainer = Trainer(args, captioner, train_data, val_data, stop)
    if trainer.teacher and "teacher" in (checkpoint or {}):  # a run without one left none
        trainer.teacher.load_state_dict(checkpoint["teacher"])
    if not args.fine_tune_encoder:
        trainer.features, trainer.val_features = frozen_features(trainer, args)
    if resuming:
        trainer.resume(checkpoint, path)
        write_reports(trainer, args)  # which the interrupted run may not have come to
    return trainer, args


def load_run(args, word_map):
    """The checkpoint to go on with or to start from.

    :return: (path, checkpoint, whether to go on with its run); (None, None, False) starts anew
    :raises UserError: if it cannot be used, or an earlier run would be overwritten
    """
    paths = [datasets.checkpoint_path(args.output_folder, args.data_name, b) for b in (False, True)]
    found = [path for path in paths if path.exists()]
    # torchrun --max_restarts repeats the command after a process has died
    restarted = bool(found) and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    resume = args.resume or ("auto" if restarted else None)
    if resume == "auto":
        if not found:
            print(f"nothing to resume at {paths[0].absolute()}: starting anew")
            return None, None, False
        path, checkpoint = first_readable(found)
    elif resume:
        path = Path(resume)
        if path.is_dir():  # of a run: its latest
            path = datasets.checkpoint_path(path, args.data_name)
        checkpoint = models.load_checkpoint(path)
    elif found:
        raise UserError(
            f"{found[0]} holds an earlier run: add --resume to go on with it, or choose another "
            "--output_folder"
        )
    elif args.init_from:
        path = models.run_checkpoint(args.init_from, args.data_name)
        checkpoint = models.load_checkpoint(path)
    else:
        return None, None, False
    if checkpoint["word_map"] != word_map:
        raise UserError(
            f"{path} was trained with another word map than {args.data_name} in "
            f"{args.data_folder}; name the data it was trained on"
        )
    return path, checkpoint, bool(resume)


def first_readable(paths):
    """(path, checkpoint) of the first file, or, where it is damaged, of the next."""
    for path, other in itertools.pairwise(paths):
        try:
            return path, models.load_checkpoint(path)
        except UserError as error:
            print(f"{error}; going on from {other} instead")
    return paths[-1], models.load_checkpoint(paths[-1])


def with_architecture(args, checkpoint, path, resuming):
    """The flags, with the architecture of a checkpoint, which says itself what it is.

    :raises UserError: if a flag contradicts it, or if a run is to be resumed with other flags
    """
    if not checkpoint:
        return args
    config, defaults = checkpoint["config"], vars(get_args_parser().parse_args([]))
    for key in models.ARCHITECTURE:  # a flag may agree or be left out
        given, built = getattr(args, key), config[key]
        if given not in (built, defaults[key]):
            raise UserError(f"--{key} {given}: {path} was built with {built}; leave the flag out")
    args = argparse.Namespace(**vars(args) | {key: config[key] for key in models.ARCHITECTURE})
    if args.scst and args.attention == "hard":
        raise UserError("--scst does not train hard attention: start from soft attention")
    changed = [
        f"--{key} {getattr(args, key)} (was {config.get(key)})" for key in defaults
        if key not in MAY_CHANGE_ON_RESUME and getattr(args, key) != config.get(key, defaults[key])
    ]  # fmt: skip
    if resuming and changed:
        raise UserError(
            f"--resume goes on with the run as it was, but these differ: {', '.join(changed)}; "
            "give the same flags, or start a new run from its weights with --init_from"
        )
    return args


def check_sizes(train_data, val_data, checkpoint):
    """:raises UserError: if images of both splits, and of a run to resume, are not of one size"""
    sizes = {"the training images": train_data.image_size}
    sizes["the validation images"] = val_data.image_size
    if checkpoint:
        sizes["the run to resume"] = checkpoint["config"]["image_size"]
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} pixels in {what}" for what, size in sizes.items())
        raise UserError(
            f"expected images of one size, found {found}; prepare the data with one --image_size"
        )


def check_space(args, captioner):
    """:raises UserError: if the disk cannot hold two checkpoints and the temporary copy of one"""
    parameters = [*captioner.encoder.parameters(), *captioner.decoder.parameters()]
    # AdamW keeps two moments of what learns
    size = sum(3 * p.nbytes if p.requires_grad else p.nbytes for p in parameters)
    if utils.is_main():
        utils.check_disk(args.output_folder, 3 * size)


def build_model(args, checkpoint, word_map, train_data, device):
    """Encoder and decoder, from a checkpoint's weights if there is one."""
    weights = "none" if checkpoint else args.encoder_weights
    encoder = models.Encoder(args.encoder, weights).to(device)
    decoder = models.build_decoder(vars(args) | {"encoder_dim": encoder.encoder_dim}, len(word_map))
    if checkpoint:
        encoder.load_state_dict(checkpoint["encoder"])
        decoder.load_state_dict(checkpoint["decoder"])
    elif args.embeddings:
        vectors, found = datasets.load_embeddings(args.embeddings, word_map, args.embed_dim)
        with torch.no_grad():
            decoder.embedding.weight[torch.from_numpy(found)] = torch.from_numpy(vectors[found])
        print(f"{args.embeddings}: vectors for {found.sum()} of {len(word_map)} words")
    if not checkpoint and weights == "none":
        starts = range(0, min(64, len(train_data)), 16)
        batches = (torch.from_numpy(train_data.images(slice(i, i + 16))) for i in starts)
        spread = models.calibrate(encoder, (batch.to(device) for batch in batches))
        if spread < 0.05 and not args.fine_tune_encoder:
            utils.note(
                "with random weights this CNN gives nearly the same features for every image, so "
                "captions cannot depend on it: take --encoder_weights imagenet, or train the CNN "
                "with --fine_tune_encoder"
            )
    encoder.fine_tune(args.fine_tune_encoder)
    return encoder, decoder.to(device)


def build_optimizer(args, captioner, teacher=None):
    """AdamW over the decoder and, if it is fine-tuned, the encoder."""
    params = [p for module in (captioner.decoder, teacher) if module for p in module.parameters()]
    groups = [{"params": params, "peak_lr": args.learning_rate}]
    if args.fine_tune_encoder:
        learning = [p for p in captioner.encoder.parameters() if p.requires_grad]
        groups.append({"params": learning, "peak_lr": args.encoder_learning_rate})
    for group in groups:  # a tensor, which CUDA graphs read, and one for each group
        group["lr"] = torch.tensor(0.0, device=captioner.device)
    is_cuda = captioner.device.type == "cuda"
    return torch.optim.AdamW(groups, capturable=is_cuda, weight_decay=args.weight_decay, fused=True)


def frozen_features(trainer, args):
    """Features of both splits, float16 (N, n, encoder_dim): on the GPU if they fit there.

    :return: (of the training images, of the validation images)
    """
    device, extract = trainer.device, trainer.captioner.features
    with utils.autocast(device, args.amp):
        splits = trainer.train_data, trainer.val_data
        found = [extract(data, args.data_folder, workers=args.workers) for data in splits]
    size = sum(features.nbytes for features in found)
    if device.type == "cuda" and size < 0.6 * torch.cuda.mem_get_info(device)[0]:
        found = [features.to(device) for features in found]
    return found


def best_score(history, metric):
    """The best score of the epochs so far."""
    return max((record[metric] for record in history), default=-1.0)


def epochs_without_gain(history, metric):
    """How many epochs ago the best score was."""
    scores = [record[metric] for record in history]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def learning_rate_factor(config, update, history):
    """Share of the peak learning rate at an update; follows from the log, so nothing is resumed."""
    if update < config["warmup"]:
        return (update + 1) / config["warmup"]
    if config["lr_schedule"] == "constant":
        return 1.0
    if config["lr_schedule"] == "plateau":
        pasts = (history[: n + 1] for n in range(len(history)))
        stale = [epochs_without_gain(past, config["metric"]) for past in pasts]
        return 0.8 ** sum(n > 0 and n % 2 == 0 for n in stale)
    done = (update - config["warmup"]) / max(1, config["total_updates"] - config["warmup"])
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


# ---------------------------------------------------------------------------------------- reports


def print_header(args, captioner, train_data, val_data):
    """What runs, on what, and the options that are not the defaults; all stand in the log."""
    modules = captioner.encoder, captioner.decoder
    encoder, decoder = (sum(p.numel() for p in m.parameters()) / 1e6 for m in modules)
    print(
        f"{captioner.config['machine']}\nmodel: {args.encoder}, {encoder:.1f} M parameters; "
        f"{args.attention} attention and {args.decoder}, {decoder:.1f} M parameters\n"
        f"data: {args.data_name}: {len(train_data):,} training images with "
        f"{len(train_data.captions):,} captions, {len(val_data):,} validation images; "
        f"{len(captioner.word_map) - 4:,} words and 4 special tokens"
    )
    for group in get_args_parser()._action_groups:
        given = [
            (a.dest, getattr(args, a.dest, a.default), a.default) for a in group._group_actions
        ]
        changed = [(key, value) for key, value, default in given if value != default]
        if changed:
            shown = (f"--{key}" if value is True else f"--{key} {value}" for key, value in changed)
            print(f"{group.title}: {' '.join(shown)}")


def print_epoch(record, args, is_best, val_data, hypotheses):
    """A line for the epoch and three captions of validation images, always the same ones."""
    print(
        f"epoch {record['epoch']:>2}: loss {record['loss']:.3f}, nll {record['nll']:.3f} | "
        f"validation: nll {record['val_nll']:.3f}; beam {args.beam_size}: BLEU-4 "
        f"{record['BLEU-4']:.2f}, ROUGE-L {record['ROUGE-L']:.2f}, CIDEr {record['CIDEr']:.1f}"
        f"{' *' if is_best else ''} | {record['words_per_second']:,} words/s, "
        f"{record['seconds']:.0f} s since start"
    )
    for i in np.linspace(0, len(val_data) - 1, 3).astype(int):
        caption, true = " ".join(hypotheses[i]), val_data.raw_references[i][0]
        print(f"    {val_data.image_names[i]}: {caption}   (true: {true})")


def write_reports(trainer, args):
    """The log (JSON lines: configuration, then a record per epoch) and the learning curves."""
    if not (trainer.history and utils.is_main()):
        return
    lines = [{"config": trainer.config}, *trainer.history]
    with utils.atomic_path(datasets.log_path(args.output_folder, args.data_name)) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = datasets.curves_path(args.output_folder, args.data_name)
    draw_curves(path, trainer.history, args.metric)


def write_tensorboard(trainer, args, record):
    """An epoch's record and three validation images, word by word, for TensorBoard."""
    if not (args.tensorboard and utils.is_main()):
        return
    from torch.utils.tensorboard import SummaryWriter

    data, captioner, step = trainer.val_data, trainer.captioner, record["update"]
    numbers = np.linspace(0, len(data) - 1, min(3, len(data))).astype(int)
    images = torch.from_numpy(data.images(numbers))  # (3, 3, S, S)
    options = utils.search_options(args) | {"beam_size": args.beam_size}
    with SummaryWriter(args.output_folder / "tensorboard") as writer:
        for name, value in record.items():
            writer.add_scalar(name, value, step)
        for number, image, (best, *_) in zip(numbers, images, captioner.caption(images, **options)):
            side = math.isqrt(best.alphas.shape[1])
            alphas = best.alphas.view(-1, 1, side, side)  # (num_words, 1, rows, columns)
            light = torch.nn.functional.interpolate(alphas, image.shape[1:], mode="bilinear")
            light = 0.2 + 0.8 * light / light.amax(dim=(2, 3), keepdim=True)
            strip = torch.cat([image / 255, *(image / 255 * light)], dim=2)
            writer.add_image(data.image_names[number], strip, step)
            writer.add_text(data.image_names[number], " ".join(captioner.text(best)), step)


def draw_curves(path, history, metric):
    """Losses and validation scores over the epochs, the best epoch marked, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [record["epoch"] for record in history]
    best = max(history, key=lambda record: record[metric])["epoch"]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = {
        "loss (nll per word)": ["nll", "val_nll"], "validation: BLEU": METRICS[:4],
        "validation: ROUGE-L": ["ROUGE-L"], "validation: CIDEr": ["CIDEr"],
    }  # fmt: skip
    names = {"nll": "training", "val_nll": "validation"}
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items()):
        for key in keys:
            values = [record.get(key, math.nan) for record in history]
            axes.plot(epochs, values, "o-", markersize=4, label=names.get(key, key))
        axes.axvline(best, color="0.7", linestyle=":", label=f"best {metric}")
        axes.set(title=title, xlabel="epoch", xlim=(0.5, epochs[-1] + 0.5))
        axes.legend(edgecolor="none", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with utils.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


# ------------------------------------------------------------------------------------------ flags

MAX_SKIPPED = 10  # updates in a row without a finite gradient, after which training gives up
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
MAY_CHANGE_ON_RESUME = (
    "data_folder", "output_folder", "resume", "device", "workers", "epochs", "patience",
    "encoder_weights", "init_from", "embeddings", "checkpoint_every", "tensorboard",
)  # fmt: skip
FOCUS = {"grounding": 0.15, "alpha_c": 0.0, "deep_output": True, "attend_word": True,
         "feature_dropout": 0.1}  # fmt: skip
PRESETS = {  # defaults that suit a data set; any flag given beside --preset wins
    "shapes": {
        "data_name": "shapes_5_cap_per_img_5_min_word_freq", "encoder": "efficientnet_lite0",
        "encoded_image_size": 0, "position_encoding": True, "decoder_dim": 256,
        "attention_dim": 256, "embed_dim": 128, "epochs": 5, "batch_size": 16,
        "learning_rate": 3e-3, "warmup": 50, "label_smoothing": 0.0,
        "dropout": 0.2, "embed_dropout": 0.1, "beam_size": 1, "amp": True, **FOCUS,
        "grounding": 0.3,
    },
    "focus": FOCUS,
}  # fmt: skip


def get_args_parser():
    examples = __doc__.partition("\n\n")[2]
    parser = utils.ArgumentParser(description="Train Show, Attend and Tell.", examples=examples)
    number = utils.bounded
    text = "other defaults: shapes, for the generated data; focus, for attention that tells more"
    parser.add_argument("--preset", choices=PRESETS, help=text)
    width, share, rate = number(int, 1, 65536), number(float, 0, 0.99), number(float, 0, 10)
    weight, whole = number(float, 0, 1000), number(int, 0, 10**9)

    add = parser.add_argument_group("data").add_argument
    text = "folder of what create_input_files.py wrote; feature stores are kept there too"
    add("--data_folder", type=Path, default=Path("data"), help=text)
    add("--data_name", default="flickr8k_5_cap_per_img_5_min_word_freq", help="their common name")
    text = "folder for checkpoints, log and learning curves; give each variant its own"
    add("--output_folder", type=Path, default=Path("checkpoints"), help=text)
    text = "write the epochs' figures and three captioned images for TensorBoard there, too"
    add("--tensorboard", action="store_true", help=text)

    add = parser.add_argument_group("model").add_argument
    text = (
        "CNN that sees the image: resnet18, 34, 50, 101, 152; vgg11, 13, 16, 19, each also as "
        "vgg11_bn; efficientnet_lite0, efficientnet_lite2; timm/NAME for any network of timm"
    )
    add("--encoder", default="resnet101", metavar="NAME", help=text)
    text = "what the CNN starts from: imagenet, none (random weights), or a state dict file"
    add("--encoder_weights", default="imagenet", metavar="FILE", help=text)
    text = "side of the grid that attention sees; 0 keeps the CNN's own (faster)"
    add("--encoded_image_size", type=number(int, 0, 64), default=14, help=text)
    add("--decoder", default="lstm", metavar="NAME", help="recurrent cell: lstm or gru")
    text = "soft weighs all places, hard samples one (REINFORCE), mean does not look anywhere"
    add("--attention", default="soft", metavar="NAME", help=text)
    add("--attention_dim", type=width, default=512, help="width of the attention network")
    add("--embed_dim", type=width, default=512, help="width of the word embedding")
    add("--decoder_dim", type=width, default=512, help="width of the recurrent state")
    text = "score words from word, state and context (paper, eq. 7), not from the state alone"
    add("--deep_output", action="store_true", help=text)
    text = "add a code of row and column to the features: tells left from right (not in the paper)"
    add("--position_encoding", action="store_true", help=text)
    text = "let attention see the previous word, which the state has not read (not in the paper)"
    add("--attend_word", action="store_true", help=text)
    add("--embeddings", type=Path, metavar="FILE", help="word vectors in GloVe's text format")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=width, default=15, help="passes over the training images")
    text = "images per update, each with all its captions; lower it if memory runs out"
    add("--batch_size", type=width, default=16, help=text)
    add("--learning_rate", type=rate, default=6e-4, help="of the decoder, at its peak")
    text = "after the warm-up; plateau: x 0.8 after every 2 epochs without a better score"
    add("--lr_schedule", choices=("cosine", "plateau", "constant"), default="cosine", help=text)
    add("--warmup", type=whole, default=200, help="updates of a rising learning rate")
    add("--weight_decay", type=rate, default=0.01, help="of AdamW")
    add("--grad_clip", type=number(float, 1e-6, 1e6), default=5.0, help="longest gradient")
    add("--dropout", type=share, default=0.6, help="share dropped before words are scored")
    add("--embed_dropout", type=share, default=0.5, help="share dropped of embedded words")
    add("--feature_dropout", type=share, default=0.3, help="share dropped of the CNN's features")
    add("--label_smoothing", type=share, default=0.1, help="of the target, over all words")
    text = "weight of the doubly stochastic penalty (eq. 14): attention visits every place"
    add("--alpha_c", type=weight, default=0.1, help=text)
    text = (
        "weight of a second loss, with which attention learns to look where the word can be read "
        "(not in the paper); take --preset focus"
    )
    add("--grounding", type=weight, default=0.0, metavar="WEIGHT", help=text)
    text = "train the CNN too, all but its first block; features are then not kept"
    add("--fine_tune_encoder", action="store_true", help=text)
    add("--encoder_learning_rate", type=rate, default=1e-4, help="of the CNN, at its peak")
    text = "with --fine_tune_encoder: mirror half of the images whose captions say no left or right"
    add("--mirror", action="store_true", help=text)
    text = (
        "self-critical sequence training (Rennie et al. 2017, Luo 2020), from --init_from: makes "
        "sampled captions of higher CIDEr-D likelier; the loss shown is minus 100 x the reward; "
        "without dropout; take a small --learning_rate, 1e-4 for example"
    )
    add("--scst", action="store_true", help=text)
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all that is random")

    add = parser.add_argument_group("scheduled sampling (Bengio et al. 2015)").add_argument
    text = "how the true word's probability falls: none, linear, exponential, inverse_sigmoid"
    add("--scheduled_sampling", default="none", metavar="NAME", help=text)
    text = "the probability never falls below this; lower it for more of the model's own words"
    add("--ss_min", type=number(float, 0, 1), default=0.75, help=text)
    text = "k of the schedule's formula (default: ss_min is reached at the last update)"
    add("--ss_k", type=number(float, 1e-6, 1e9), help=text)
    add("--ss_slope", type=number(float, 0, 1), help="linear only: fall per update")
    add("--ss_argmax", action="store_true", help="feed the likeliest word, not a random one")

    add = parser.add_argument_group("validation").add_argument
    add("--metric", choices=METRICS, default="BLEU-4", help="what the best checkpoint is best at")
    add("--patience", type=width, default=6, help="epochs without a better score: stop")

    add = parser.add_argument_group("continuing").add_argument
    text = "go on with an interrupted run: that of --output_folder, or of a checkpoint or folder"
    add("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=text)
    text = "start a new run from the weights of a checkpoint, or of the best of a run's folder"
    add("--init_from", type=Path, metavar="CHECKPOINT", help=text)
    text = "save every so many updates too, for long epochs; 0: after epochs, and when stopped"
    add("--checkpoint_every", type=whole, default=0, help=text)
    utils.add_search_flags(parser)
    utils.add_device_flags(parser)
    return parser


def check_args(args):
    """Refuse flags that contradict each other, before anything is read or written."""
    name, k, slope = args.scheduled_sampling, args.ss_k, args.ss_slope
    models.look_up(models.SCHEDULES, name, "schedule")
    constants = k is not None or slope is not None or args.ss_argmax
    faults = [
        (args.tensorboard and not importlib.util.find_spec("tensorboard"), "--tensorboard needs a "
         "package that is not there: pip install tensorboard"),
        (args.resume and args.init_from, "--resume goes on, --init_from starts: give one of them"),
        (args.embeddings and args.init_from, "--embeddings and --init_from: give one of them"),
        (args.scst and not (args.init_from or args.resume), "--scst needs a model: --init_from"),
        (args.scst and name != "none", "--scst feeds own words: leave out --scheduled_sampling"),
        (args.mirror and not args.fine_tune_encoder, "--mirror needs --fine_tune_encoder: features "
         "of a frozen CNN are computed once"),
        (name == "exponential" and (k or 0) > 1, f"--ss_k {k}: expected at most 1 for exponential"),
        (slope is not None and name not in ("linear", "none"), f"--ss_slope is not for {name}"),
        (name == "none" and constants, "--ss_k, --ss_slope and --ss_argmax do nothing without "
         "--scheduled_sampling"),
    ]  # fmt: skip
    for found, message in faults:
        if found:
            raise UserError(message)


def with_preset(parser):
    """The parser with the defaults of the preset that the command line names, if it names one."""
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument("--preset")
    args, _ = preset.parse_known_args()
    parser.set_defaults(**PRESETS.get(args.preset, {}))
    return parser


if __name__ == "__main__":
    utils.run(main, with_preset(get_args_parser()))
