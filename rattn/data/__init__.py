"""Text to batches: vocabularies, tasks, the indexed token stream and the rows cut from it.

The rules that everything here keeps:

- A document is its tokens and then exactly one EOS. There is no BOS.
- A stream is one document after another. Row r of length T has inputs `tokens[r*T : (r+1)*T]` and targets one token
  further, so there are ceil((tokens - 1) / T) rows and each token but the first of the stream is a target exactly once.
  The last row is padded: segment id 0, no target counts.
- A document's first token is never a target that counts: nothing of its own document stands before it.
- Segment ids count the documents inside a row from 1.

Only `tasks` (used by `rattn.prepare`) imports TensorFlow and seqio.
"""
