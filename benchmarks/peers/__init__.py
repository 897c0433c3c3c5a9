"""moe_offload, llama.cpp and transformers on the same random weights, in turns: `python -m benchmarks.peers`.

Each engine runs in a process of its own (worker.py), so that their thread pools do not meet, and llama.cpp's may be
another Python installation: whatever that process imports (worker.py, protocol.py, llama_engine.py, gguf_file.py,
stored.py) needs numpy alone beside llama-cpp-python and gguf.
"""
