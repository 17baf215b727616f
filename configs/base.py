"""Every key that a rattn config has, with a default and its unit; a recipe states what differs.

Not a recipe to train: start from `tiny`, `small`, `rattn_3b` or `rattn_12b`.
"""

from ml_collections import ConfigDict

from rattn.config import parse_arguments


def get_config(arguments: str = "") -> ConfigDict:
    parse_arguments(arguments)
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 1000
    # Rows a step, over all hosts; split into `accumulation_steps` microbatches inside the step.
    config.batch_size = 8
    config.accumulation_steps = 1
    # Tokens a row (T). Any value slices the same prepared stream.
    config.context_length = 512
    # On a GPU: the same bits in every run of a workdir and after a resume, by slower kernels and kept tuning choices.
    # TPUs and CPUs give them anyway.
    config.deterministic = False
    # A non-finite loss or gradient never reaches the weights; then "stop" ends the run, "skip" goes on.
    config.on_non_finite = "stop"
    # Workdir of a run that this one begins from ("": from nothing), until it has a checkpoint of its own.
    config.init_from = ""
    # The checkpoint's step; 0 is the last.
    config.init_from_step = 0
    # "everything": parameters, optimizer state and step count. The run goes on where that one stood, with the same
    # data in the same order; total_steps and the schedule count from that run's beginning. So a "wsd" trunk is left at
    # a checkpoint of its constant stretch, to decay in the last decay_steps of the branch's own total_steps.
    # "parameters": these alone; step 0, a new optimizer, any data. Either way the window may be another, and every
    # parameter must have its shape: no mixer is turned into one that has other norms.
    config.init_from_what = "everything"

    config.model = model = ConfigDict()
    model.vocab_size = 259
    model.width = 128
    model.layers = 4
    model.query_heads = 4
    model.kv_heads = 2
    model.head_dim = 32
    model.mlp_width = 384
    # Mixers, repeated over the depth (a remainder is allowed): full, swa, rattention, linear.
    model.pattern = ("rattention", "rattention", "rattention", "full")
    # Rotary positions, one bool for each entry of the pattern.
    model.rope_pattern = (True, True, True, False)
    model.rope_theta = 5e5
    # Tokens that a query attends to, itself included (the paper's w + 1).
    model.window = 64
    # Windows to draw from anew for each training step, a function of (seed, step) alone, and their weights (any scale,
    # () for equal ones); the last window_final_steps train at model.window, which evaluations use throughout. () draws
    # nothing. Each window has its own compiled step.
    model.window_choices = ()
    model.window_weights = ()
    model.window_final_steps = 0
    model.feature_map = "softmax"
    model.qk_norm = True
    # φ sees q and k as projected, before any qk-norm, unless this is set.
    model.feature_map_after_qk_norm = False
    # Gated feed-forward: "gelu" is GeGLU, "silu" SwiGLU.
    model.activation = "gelu"
    model.tied_embeddings = True
    # Logits become cap·tanh(logits/cap); 0 turns it off.
    model.logits_soft_cap = 0.0
    model.norm_epsilon = 1e-6
    model.compute_dtype = "float32"
    # What the backward pass recomputes: "none"; "block", each repeat of the pattern from its input; "save_attention",
    # all of it but attention; "save_products", nothing but what is elementwise: norms, rotations, activations;
    # "save_operands", activations alone; "offload", as "block", with the inputs kept in the host's memory (TPU).
    model.remat = "none"
    # The repeats of the pattern are one scanned body, compiled once whatever the depth. False compiles every layer for
    # itself, which takes longer and spares a GPU the copies of what the backward pass needs.
    model.scan_blocks = True

    config.loss = loss = ConfigDict()
    # Weight of log²Z, which keeps the softmax normaliser near 1; 0 turns it off.
    loss.z_loss = 0.0
    # Logits exist for this many tokens of a row at a time; 0 means the whole row.
    loss.chunk_tokens = 0

    config.data = data = ConfigDict()
    # "stream" reads what rattn.prepare wrote to `path`; "synthetic" draws tokens and "recall" associative-recall rows,
    # and need no files.
    data.source = "stream"
    data.path = "data/state_of_the_union"
    # What rattn.prepare is asked for when `path` is missing. Without a task (""), any prepared `path` will do.
    data.task = "state_of_the_union"
    data.module = ""
    data.files = ""
    # "bytes", a SentencePiece model file, or, for synthetic tokens, "ids:SIZE".
    data.vocabulary = "bytes"
    data.train_vocabulary_size = 0
    data.validation_fraction = 0.05
    # Average tokens of a synthetic document.
    data.document_tokens = 1024
    # Key-value pairs of an associative-recall row, each asked for once.
    data.recall_pairs = 16
    # Training rows are in equal parts of one such document, of two with half the pairs each, … of 2ⁿ.
    data.recall_halvings = 0
    # Sampling weights of a mixture's sources; () takes the mixture's own rates.
    data.weights = ()
    data.read_threads = 2
    data.prefetch_batches = 8

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-3
    # Linear warm-up from 0, then "cosine" or "linear" to the end, or "wsd": constant, then linear over decay_steps.
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 0
    optimizer.decay_steps = 0
    # The last learning rate as a fraction of the peak.
    optimizer.final_fraction = 0.1
    # Decoupled, scaled by the learning rate; matrices only (no norm scales, no embeddings).
    optimizer.weight_decay = 0.1
    # First and second moments of adamw; momentum and decay of rmsprop; muon: beta2 is its momentum. Not adafactor's.
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.epsilon = 1e-8
    # Global gradient norm is clipped to this; 0 turns it off.
    optimizer.clip_norm = 1.0

    config.mesh = mesh = ConfigDict()
    # Devices along each mesh axis; at most one may be -1: what is left.
    mesh.data = -1
    mesh.fsdp = 1
    mesh.seq = 1
    mesh.model = 1
    # How often devices along data and fsdp exchange weights and gradients where a step has several microbatches.
    # "microbatch": a layer's weights whenever it runs, its gradients whenever it has run back. "step": all weights
    # before the first microbatch, the gradients' float32 sums after the last; every device then holds the whole model
    # in the compute dtype and the whole sums, and seq and model must be 1.
    mesh.exchange = "microbatch"

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500
    # The newest that stay, and steps that are saved and stay for good, to begin other runs from.
    checkpoint.keep = 2
    checkpoint.keep_steps = ()

    config.evaluation = evaluation = ConfigDict()
    evaluation.every_steps = 500
    # Batches an evaluation reads, spread evenly over the validation split, and the last evaluation; 0 reads all of it.
    evaluation.max_batches = 0
    evaluation.final_max_batches = 0
    evaluation.batch_size = 8

    config.log = log = ConfigDict()
    log.every_steps = 10
    log.tensorboard = True
    # Norms and shares of the two branches of each RATTENTION layer (`branches/…`), on one validation batch; 0: never.
    log.branches_every_steps = 0
    # First and last step of a profiler trace, written to the workdir; () for none.
    log.profile_steps = ()
    return config
