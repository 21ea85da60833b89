"""The control plane: decides what is computed next, and computes nothing.

Standard library only. `EngineCore.step` is one turn of the loop; `Scheduler` decides,
`BlockManager` keeps the books of the KV cache, `Policy` is where an idea enters.
"""
