"""Train a captioner, validate it on captions by beam search, and keep the best.

python train.py
python train.py --preset shapes
python train.py --encoder vgg16 --decoder gru --output_folder vgg16_gru
python train.py --scheduled_sampling inverse_sigmoid --output_folder scheduled
python train.py --resume
"""

import contextlib
import functools
import importlib.util
import math
import sys
import time
from pathlib import Path

if sys.flags.safe_path:
    sys.exit("train.py: error: unset PYTHONSAFEPATH, which hides this suite's files")

import utils
from captioning.run import command_line, distributed, files, machine, messages, paths, signals
from captioning.run.lazy import lazy
from captioning.run.presets import DECODER_DEFAULTS, PRESETS, note_idle
from utils import UserError

np, torch, datasets, models = lazy("numpy", "torch", "datasets", "models")
batches, cider, cuda_graphs, decoders, dry_run, schedules, starting, tally, vocabulary = lazy(
    "batches", "cider", "cuda_graphs", "decoders", "dry_run", "schedules", "starting", "tally",
    "vocabulary", within="captioning.model",
)  # fmt: skip
curves, log, metrics = lazy("curves", "log", "metrics", within="captioning.report")


def train(trainer, args):
    """The training: epochs, batches, validation, checkpoints.

    :param trainer: ``Trainer``, from :func:`prepare`: the model, and where its training stands
    """
    model, optimizer, history = trainer.model, trainer.optimizer, trainer.history

    def train_step(batch, epsilon):
        with machine.autocast(trainer.device, args.amp):
            inputs = trainer.encoder_input(batch)
            rows = batch.captions, batch.decode_lengths, batch.image_index
            output = model(inputs, *rows, epsilon, args.ss_argmax)
        loss, nll = trainer.loss(output, batch)
        optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel averages the gradients, but the processes' losses add up
        (loss * distributed.world_size()).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainer.parameters, args.grad_clip)
        # The fused optimizer reads found_inf on the device, as torch.amp.GradScaler would set it:
        # where it is 1 (a gradient was not finite), weights, moments and counts stay as they are.
        # To ask "is the norm finite?" in Python would make the host wait for the GPU at each
        # update. No gradients were scaled, so there is no grad_scale to undo.
        optimizer.found_inf, optimizer.grad_scale = 1 - norm.isfinite().float(), None
        optimizer.step()
        trainer.count(loss.detach(), nll, batch)

    step = cuda_graphs.CudaGraphStep(train_step, trainer) if trainer.use_graphs else train_step
    is_patient = schedules.is_patient
    while len(history) < args.epochs and is_patient(trainer.config, history, args.patience):
        # self-critical training samples without dropout, so it trains without, too
        trainer.captioner.decoder.train(not args.scst)
        for batch in trainer.batches():
            with trainer.stop.held():  # a signal to stop takes effect between two updates
                factor = schedules.learning_rate_factor(trainer.config, trainer.update, history)
                for group in optimizer.param_groups:
                    group["lr"].fill_(group["peak_lr"] * factor)
                machine.set_seed(args.seed, trainer.update, distributed.rank())
                batch = trainer.sampled(batch) if args.scst else batch
                step(batch.to(trainer.device), trainer.epsilon(trainer.update))
                trainer.advance(batch)
                if args.checkpoint_every and trainer.update % args.checkpoint_every == 0:
                    trainer.save(trainer.latest_path)
            trainer.stop.check()
        record = trainer.epoch_record()
        trainer.save(trainer.latest_path)  # first: validation may fail
        where = f"{trainer.latest_path} has what epoch {record['epoch']} learned"
        with messages.naming(f"validation failed; {where}"):
            scores, hypotheses = validate(trainer, args)
        record |= scores | {"seconds": round(time.time() - trainer.started, 1)}
        with trainer.stop.held():
            history.append(record)
            is_best = schedules.best_epoch(history, args.metric) is record
            trainer.tally.reset()
            if is_best:  # saved first: killed in between, the run validates again and ends alike
                trainer.save(trainer.best_path)
            trainer.save(trainer.latest_path)
            trainer.write_reports()
            log.print_epoch(record, trainer.config, is_best, trainer.val_data, hypotheses)


def validate(trainer, args):
    """Scores of captions made by beam search, and teacher-forced loss, on the validation split.

    :return: (dict of metrics and ``val_nll``, list of captions as lists of words)
    """
    data, captioner = trainer.val_data, trainer.captioner
    share = distributed.share(len(data))
    captioner.decoder.eval()
    machine.set_seed(args.seed, trainer.update)  # of locations that hard attention samples
    with machine.autocast(trainer.device, args.amp):
        if trainer.val_features is None:  # the CNN has changed
            features = captioner.features(data, args.data_folder, share, args.workers)
        else:
            features = trainer.val_features[share]
        nll = teacher_forced_nll(captioner.decoder, data, features, share)
        options = command_line.search_options(args)
        found = models.caption_split([captioner], [features], with_alphas=False, **options)
    hypotheses = sum(distributed.all_gather([captioner.text(best) for best, *_ in found]), [])
    scores = distributed.is_main() and metrics.score_captions(data.references, hypotheses)
    return distributed.broadcast(scores) | {"val_nll": nll}, hypotheses


def teacher_forced_nll(decoder, data, features, share, batch_size=64):
    """Cross-entropy per word of a split's true captions, each word predicted from those before it.

    :param features: float (N, n, encoder_dim), of this process's share of the images
    """
    device, nll, words = next(decoder.parameters()).device, 0.0, 0
    numbers = np.arange(len(data))[share]
    for i in range(0, len(numbers), batch_size):
        captions, lengths, image_index = datasets.collate(data, numbers[i : i + batch_size])
        if not lengths:  # their captions are all longer than --max_len
            continue
        captions, image_index = torch.from_numpy(captions), torch.from_numpy(image_index)
        with torch.no_grad():
            encoder_out = features[i : i + batch_size].to(device)  # (num_images, n, encoder_dim)
            output = decoder(encoder_out, captions.to(device), lengths, image_index.to(device))
            nll += models.caption_loss(output, num_words=1, alpha_c=0)[1].item()
        words += sum(lengths)
    nll, words = np.sum(distributed.all_gather((nll, words)), axis=0)
    return float(nll / words)


class Trainer:
    """What a training needs at every update, and where it stands.

    Nothing is drawn that does not follow from seed, update and process, so that a run can go on
    where it was stopped. With several processes each takes its share of a batch's images.
    """

    def __init__(self, args, captioner, train_data, val_data, stop):
        self.args, self.captioner, self.stop = args, captioner, stop
        self.config = captioner.config
        self.train_data, self.val_data, self.device = train_data, val_data, captioner.device
        self.latest_path = paths.checkpoint_path(args.output_folder, args.data_name)
        self.best_path = paths.checkpoint_path(args.output_folder, args.data_name, best=True)
        self.features = self.val_features = self.progress = self.teacher = None
        if args.mirror and datasets.mirrorable(train_data).all():
            messages.note("--mirror: no caption says left or right in a language that it knows")
        # self-critical training has no true words to teach, and "mean" attention learns nothing
        if args.grounding and not args.scst and args.attention != "mean":
            sizes = captioner.encoder.encoder_dim, len(captioner.word_map)
            self.teacher = models.AttentionTeacher(*sizes).to(self.device)
        self.optimizer = build_optimizer(args, captioner, self.teacher)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        encoder = captioner.encoder if args.fine_tune_encoder else None
        self.model = models.CaptioningNetwork(encoder, captioner.decoder, self.teacher)
        if distributed.world_size() > 1:
            # networks of timm and of one's own may have layers that the grid does not come from
            whole = args.encoder.startswith(("resnet", "vgg", "efficientnet_lite"))
            some_idle = args.fine_tune_encoder and not whole
            self.model = torch.nn.parallel.DistributedDataParallel(
                self.model, find_unused_parameters=some_idle
            )
        self.use_graphs = self.device.type == "cuda" and distributed.world_size() == 1
        self.history, self.update, self.started = [], 0, time.time()
        self.tally = tally.Tally(self.device)
        if args.scst:
            self.reward = cider.CiderD(train_data.references)
            banned = datasets.special_tokens(captioner.word_map)
            self.banned = torch.tensor(banned, device=self.device)

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
            mirrored = coins & datasets.mirrorable(self.train_data)
        done = self.update - epoch * len(order)
        self.epoch_began = time.time() - self.tally.seconds
        bar = utils.progress(
            total=len(order), initial=done, desc=f"epoch {epoch + 1}/{args.epochs}", unit="batch",
            leave=False,
        )  # fmt: skip
        with bar as self.progress:
            load = lambda numbers: self.load(numbers, mirrored)
            yield from machine.read_ahead(load, order[done:], args.workers)
        self.tally.check(self.update)

    def load(self, numbers, mirrored):
        """What an update needs of its images, on the CPU; runs in threads.

        :param numbers: int array, the images of all processes
        :param mirrored: bool array (N,), which of all images to show mirrored; or None
        :return: ``Batch`` of this process's share
        """
        num_words = datasets.count_words(self.train_data, numbers)
        numbers = numbers[distributed.rank() :: distributed.world_size()]
        captions, lengths, image_index = datasets.collate(self.train_data, numbers)
        if self.features is None:
            inputs = self.train_data.images(numbers)
            if mirrored is not None:
                inputs[mirrored[numbers]] = inputs[mirrored[numbers], ..., ::-1]
        elif self.features.is_cuda:
            inputs = numbers
        else:  # by numpy: torch in a thread starts OpenMP threads that fight for the cores
            inputs = self.features.numpy().take(numbers, axis=0)
        batch = batches.Batch(
            numbers, inputs, captions, lengths, image_index, np.float32(num_words)
        )
        return batch.tensors(self.device)

    def sampled(self, batch):
        """A batch with captions that the model draws itself, and what each was worth (--scst)."""
        with torch.no_grad(), machine.autocast(self.device, self.args.amp):
            inputs = self.encoder_input(batch.to(self.device))
            encoder_out = self.captioner.encoder(inputs) if self.features is None else inputs
            options = self.reward, self.args.max_decode_steps
            drawn = models.sample_and_reward(self.captioner, batch, encoder_out, *options)
        return drawn.tensors(self.device)

    def count(self, loss, nll, batch):
        """Add an update to the epoch's sums. With ``--scst`` the loss is minus the reward."""
        if self.args.scst:  # each process knows the mean of all; the tally adds the processes up
            loss = -batch.reward / distributed.world_size()
        self.tally.add(loss, nll, self.optimizer.found_inf)

    def advance(self, batch):
        """One update more: counters, progress bar, and now and then a look at the losses."""
        self.tally.words += int(batch.num_words)
        self.tally.seconds = time.time() - self.epoch_began
        self.update += 1
        self.progress.update()
        if self.device.type == "cpu" or self.update % 25 == 0:
            self.tally.check(self.update)
        if self.update % 25 == 0:
            self.progress.set_postfix_str(self.tally.so_far())

    def epoch_record(self):
        """What the log says of the epoch: losses, rates, words per second."""
        last = self.update - 1
        factor = schedules.learning_rate_factor(self.config, last, self.history)
        record = {"epoch": len(self.history) + 1, "update": self.update} | self.tally.means()
        record |= {"learning_rate": self.args.learning_rate * factor, "epsilon": self.epsilon(last)}
        return record | {"peak_memory_gb": machine.peak_memory_gb(self.device)}

    def save(self, path):
        """Save the model and where its training stands; all processes must ask at the same time."""
        captioner = self.captioner
        state = {
            "config": self.config, "word_map": captioner.word_map, "history": self.history,
            "encoder": captioner.encoder.state_dict(), "decoder": captioner.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(), "update": self.update,
            "seconds": time.time() - self.started,
            "epoch_so_far": self.tally.state_dict(),
        }  # fmt: skip
        if self.teacher:
            state["teacher"] = self.teacher.state_dict()
        with self.stop.held():
            if distributed.is_main():
                models.save_checkpoint(path, state)

    def write_reports(self):
        """The log, the learning curves and, if it is wanted, TensorBoard's files."""
        args, where = self.args, (self.args.output_folder, self.args.data_name)
        if self.history and distributed.is_main():
            log.write_log(paths.log_path(*where), self.config, self.history)
            curves.draw_curves(paths.curves_path(*where), self.history, args.metric)
            if args.tensorboard:
                options = command_line.search_options(args)
                about = self.captioner, self.val_data, self.history[-1]
                log.write_tensorboard(args.output_folder, *about, options)


def main(args):
    check_args(args)
    with contextlib.ExitStack() as stack:  # of what the run holds until its end: lock, processes
        trainer, args = prepare(args, stack)
        try:
            train(trainer, args)
        except signals.Stopped as signal:
            trainer.save(trainer.latest_path)
            how = "saved. The same command with --resume goes on"
            signal.args = (f"{signal} after update {trainer.update}; {how}",)
            raise
        memory = machine.peak_memory_gb(trainer.device)
        log.print_end(trainer.config, trainer.history, memory, trainer.best_path)


def prepare(args, stack):
    """Data, model, optimizer and features of a run, new or to go on with.

    :param stack: ``contextlib.ExitStack`` for what the run holds until its end
    :return: (``Trainer``, the flags with the architecture that a checkpoint brought)
    """
    device = stack.enter_context(machine.processes(args.device))
    stop = stack.enter_context(signals.StopSignals())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    train_data, val_data = (
        datasets.CaptionDataset(paths.split_path(args.data_folder, split, args.data_name))
        for split in ("train", "val")
    )
    word_map = datasets.load_word_map(paths.word_map_path(args.data_folder, args.data_name))
    train_data.check_word_map(word_map), val_data.check_word_map(word_map)
    if len(val_data) == 1 and args.metric == "CIDEr":
        raise UserError("--metric CIDEr is always 0 for a single image; take BLEU-4, for example")
    if not len(val_data.captions):
        raise UserError(
            "no validation caption is of at most --max_len words: prepare the data with a larger "
            "--max_len"
        )
    own, given = (args.output_folder, args.data_name), (args.resume, args.init_from)
    known = datasets.load_word_map(args.word_map) if args.word_map else None
    path, checkpoint, resuming = starting.find_start(*own, *given, models.load_checkpoint, known)
    if not checkpoint:  # there may be nothing to resume: what needs a model must name one
        check_args(type(args)(**vars(args) | {"resume": None}))
    else:
        args = starting.as_built(args, get_args_parser(), checkpoint["config"], path, resuming)
    if resuming:
        word_map = vocabulary.same_words(checkpoint, path, word_map, (train_data, val_data))
    starting.check_sizes(train_data, val_data, checkpoint, resuming)
    machine.set_seed(args.seed)
    weights = "none" if checkpoint else args.encoder_weights
    encoder = models.Encoder(args.encoder, weights).to(device)
    args.decoder_options = decoders.own_options(models.DECODERS, args.decoder, args.decoder_options)
    sizes = vars(args) | {"encoder_dim": encoder.encoder_dim}
    build, encoder_dim = functools.partial(models.build_decoder, sizes), encoder.encoder_dim
    decoder = build(len(word_map))
    if args.scst and hasattr(decoder, "baseline"):
        raise UserError("--scst does not train hard attention: start from soft attention")
    dry_run.check_loadable(decoder, functools.partial(build, len(word_map)))
    if args.embeddings and not resuming:
        brought = checkpoint["word_map"] if checkpoint else {}
        starting.fill_embedding(decoder, args.embeddings, word_map, brought)
    if checkpoint:  # of other words, perhaps: what is new to it keeps what it was given above
        words = checkpoint["word_map"], word_map
        encoder.load_state_dict(checkpoint["encoder"])
        vocabulary.take_over(decoder, checkpoint["decoder"], *words, build)
        vocabulary.describe(path, *words)
    if not checkpoint and weights == "none":
        starting.calibrate_on(encoder, train_data, device, learns=args.fine_tune_encoder)
    encoder.fine_tune(args.fine_tune_encoder)
    config = {key: str(v) if isinstance(v, Path) else v for key, v in sizes.items()}
    config["total_updates"] = args.epochs * math.ceil(len(train_data) / args.batch_size)
    config |= {"image_size": train_data.image_size, "machine": machine.describe_machine(device)}
    config["images_digests"] = [train_data.images_digest, val_data.images_digest]
    captioner = models.Captioner(encoder, decoder.to(device), word_map, config)
    latest_path = paths.checkpoint_path(args.output_folder, args.data_name)
    stack.enter_context(files.locked(paths.lock_path(latest_path), latest_path))
    starting.check_space(latest_path, encoder, decoder)
    changed = command_line.changed_flags(get_args_parser(), args)
    log.print_header(captioner, train_data, val_data, changed)
    trainer = Trainer(args, captioner, train_data, val_data, stop)
    if trainer.teacher and "teacher" in (checkpoint or {}):  # a run without one left none
        build = functools.partial(models.AttentionTeacher, encoder_dim)
        vocabulary.take_over(trainer.teacher, checkpoint["teacher"], *words, build)
    dry_run.check_decoder(captioner, train_data.images([0, len(train_data) - 1]))
    if not args.fine_tune_encoder:
        trainer.features, trainer.val_features = starting.frozen_features(
            captioner, (train_data, val_data), args.data_folder, args.amp, args.workers
        )
    decoder.sample_location = args.sample_location
    if resuming:
        starting.resume(trainer, checkpoint, path)
        trainer.write_reports()  # which the interrupted run may not have come to
    return trainer, args


def build_optimizer(args, captioner, teacher=None):
    """AdamW over the decoder, the attention's teacher and, if it is fine-tuned, the encoder."""
    params = [p for module in (captioner.decoder, teacher) if module for p in module.parameters()]
    groups = [{"params": params, "peak_lr": args.learning_rate}]
    if args.fine_tune_encoder:
        learning = [p for p in captioner.encoder.parameters() if p.requires_grad]
        groups.append({"params": learning, "peak_lr": args.encoder_learning_rate})
    for group in groups:  # a tensor, which CUDA graphs read, and one for each group
        group["lr"] = torch.tensor(0.0, device=captioner.device)
    is_cuda = captioner.device.type == "cuda"
    return torch.optim.AdamW(groups, capturable=is_cuda, weight_decay=args.weight_decay, fused=True)


METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")


def get_args_parser():
    presets = {"preset": PRESETS, "decoder": DECODER_DEFAULTS}
    parser = command_line.ArgumentParser(__doc__, presets)
    number = command_line.bounded
    text = (
        "other defaults: shapes, for the generated data; focus, for attention that tells more; "
        "adapt, to go on from a model (--init_from) with a few pictures of your own"
    )
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
        "vgg11_bn; efficientnet_lite0, efficientnet_lite2; timm/NAME for timm's CNNs and ViTs"
    )
    add("--encoder", default="resnet101", metavar="NAME", help=text)
    text = "what the CNN starts from: imagenet, none (random weights), or a state dict file"
    add("--encoder_weights", default="imagenet", metavar="FILE", help=text)
    text = "side of the grid that attention sees; 0 keeps the CNN's own (a ResNet's 8: faster)"
    add("--encoded_image_size", type=number(int, 0, 64), default=14, help=text)
    add("--decoder", default="lstm", metavar="NAME", help="lstm or gru, recurrent, or transformer")
    own = {"dest": "decoder_options", "action": command_line.IntoDict, "default": {}}
    add("--layers", **own, type=number(int, 1, 48), help="of the transformer (default: 2)")
    text = "of each attention of the transformer (default: 4)"
    add("--heads", **own, type=number(int, 1, 64), help=text)
    text = "soft weighs all places, adaptive a place for not looking as well, hard samples one"
    text += " (REINFORCE), mean does not look anywhere"
    add("--attention", default="soft", metavar="NAME", help=text)
    add("--attention_dim", type=width, default=512, help="width of the attention network")
    add("--embed_dim", type=width, default=512, help="width of the word embedding")
    add("--decoder_dim", type=width, default=512, help="width of the recurrent state")
    text = "score words from word, state and context (paper, eq. 7), not from the state alone"
    add("--deep_output", action=command_line.Switch, help=text)
    text = "add a code of row and column to the features: tells left from right (not in the paper)"
    add("--position_encoding", action=command_line.Switch, help=text)
    text = "let attention see the previous word, which the state has not read (not in the paper)"
    add("--attend_word", action=command_line.Switch, help=text)
    add("--embeddings", type=Path, metavar="FILE", help="start from word vectors, as GloVe's text")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=width, default=15, help="passes over the training images")
    text = "images per update, each with all its captions; lower it if memory runs out"
    add("--batch_size", type=width, default=16, help=text)
    add("--learning_rate", type=rate, default=6e-4, help="peak, of the decoder; transformer: 4e-4")
    text = "after the warm-up; plateau: x 0.8 after every 2 epochs without a better score"
    add("--lr_schedule", choices=(*schedules.LEARNING_RATES,), default="cosine", help=text)
    text = "updates of a rising learning rate; at most a tenth of the run's"
    add("--warmup", type=whole, default=200, help=text)
    add("--weight_decay", type=rate, default=0.01, help="of AdamW")
    add("--grad_clip", type=number(float, 1e-6, 1e6), default=5.0, help="norm of longest gradient")
    add("--dropout", type=share, default=0.6, help="share dropped before scoring; transformer: 0.3")
    add("--embed_dropout", type=share, default=0.5, help="of embedded words; transformer: 0.3")
    add("--feature_dropout", type=share, default=0.3, help="share dropped of the CNN's features")
    add("--label_smoothing", type=share, default=0.1, help="of the target, over all words")
    text = "weight of the doubly stochastic penalty (eq. 14): attention visits every place"
    add("--alpha_c", type=weight, default=0.1, help=text)
    text = (
        "weight of a second loss, with which attention learns to look where the word can be read "
        "(not in the paper); take --preset focus"
    )
    add("--grounding", type=weight, default=0.0, metavar="WEIGHT", help=text)
    text = "train the CNN too, all but its first layers (timm/NAME: all); no features are kept"
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
    text = "k of the schedule's formula (default: 1 if linear, else ss_min is reached at the end)"
    add("--ss_k", type=number(float, 1e-6, 1e9), help=text)
    text = "linear only: fall per update (default: ss_min is reached at the end)"
    add("--ss_slope", type=number(float, 0, 1), help=text)
    add("--ss_argmax", action="store_true", help="feed the likeliest word, not a random one")

    add = parser.add_argument_group("validation").add_argument
    add("--metric", choices=METRICS, default="BLEU-4", help="what the best checkpoint is best at")
    text = "stop after so many epochs without a better score, of those after the warm-up"
    add("--patience", type=width, default=6, help=text)

    add = parser.add_argument_group("continuing").add_argument
    text = "go on with an interrupted run: that of --output_folder, or of a checkpoint or folder"
    add("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=text)
    text = (
        "start a new run from the weights of a checkpoint, or of the best of a run's folder, on "
        "this data or any other; captioner is the one that comes with the suite"
    )
    add("--init_from", type=Path, metavar="CHECKPOINT", help=text)
    text = "the word map of --init_from; only a checkpoint of the PyTorch tutorial needs it"
    add("--word_map", type=Path, metavar="FILE", help=text)
    text = "save every so many updates too, for long epochs; 0: after epochs, and when stopped"
    add("--checkpoint_every", type=whole, default=0, help=text)
    command_line.add_search_flags(parser)
    command_line.add_device_flags(parser)
    return parser


def check_args(args):
    """Refuse flags that contradict each other, before anything is read or written."""
    name, k, slope = args.scheduled_sampling, args.ss_k, args.ss_slope
    messages.look_up(models.SCHEDULES, name, "schedule")
    constants = k is not None or slope is not None or args.ss_argmax
    faults = [
        (args.tensorboard and not importlib.util.find_spec("tensorboard"), "--tensorboard needs a "
         "package that is not there: pip install tensorboard"),
        (args.resume not in (None, "auto") and args.init_from, "--resume CHECKPOINT goes on, "
         "--init_from starts: give one of them"),
        (args.word_map and not args.init_from, "--word_map is that of --init_from: give that too"),
        (args.scst and not (args.init_from or args.resume), "--scst needs a model: --init_from"),
        (args.preset == "adapt" and not (args.init_from or args.resume), "--preset adapt needs a "
         "model to go on from: --init_from captioner, for example"),
        (args.scst and name != "none", "--scst feeds own words: leave out --scheduled_sampling"),
        (args.mirror and not args.fine_tune_encoder, "--mirror needs --fine_tune_encoder: features "
         "of a frozen CNN are computed once"),
        (name == "exponential" and (k or 0) > 1, f"--ss_k {k}: expected at most 1 for {name}"),
        (slope is not None and name not in ("linear", "none"), f"--ss_slope is not for {name}"),
        (name == "inverse_sigmoid" and (k or 1) < 1, f"--ss_k {k}: expected at least 1 for {name}"),
        (name == "none" and constants, "--ss_k, --ss_slope, --ss_argmax need --scheduled_sampling"),
    ]  # fmt: skip
    for found, message in faults:
        if found:
            raise UserError(message)
    note_idle(args, command_line.given_flags(get_args_parser()))


if __name__ == "__main__":
    utils.run(main, get_args_parser())
