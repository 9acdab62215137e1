"""Engines: sampling from a model, and new weights into it while it lives. `generate.py` is the way in.

contract.py      what both engines promise: EngineError, Sample, Request, Stops; make_requests checks what
                 generate() is given; sample_seed, log_distribution, draw decide a token; context_of,
                 known_ids, check_weights decide what fits
embedded.py      TorchEngine: continuous batching in plain torch, over the trainer's own model
vllm_engine.py   VllmEngine: real vLLM, in this process or beside it
push.py          push: new weights into an engine, and the proof that they arrived; StaleWeights, probe, score
"""
