"""The README's program: a model cut into four stages, each at work on a different frame of a stream."""

import sys

import sidestream as ss

source = sys.argv[1] if len(sys.argv) > 1 else "synthetic:seconds=4"
model = ss.create_model("efficientnet_lite0", weights="default")  # or any nn.Module
frames = ss.stream(source)  # a file, camera:0, rtsp://..., a folder, or synthetic
stages = ss.cut(model, num_stages=4)  # your own model: ss.cut(model, example_input, num_stages=4)
circuit = ss.pipelined(stages)  # or sequential, semi_parallel, parallel
print(ss.chart(circuit, num_ticks=6))
with ss.run(circuit, frames, executor="threads") as outputs:
    for out in outputs:
        print(out.frame_index, int(out.value.argmax()), f"{out.latency_seconds * 1e3:.0f} ms")
