# simlayer-run, and in /usr/lib/simlayer the libllama.so.0 for llama.cpp's frontends.
#
#   docker build -t simlayer .
#   docker run --rm -it -v "$PWD/models:/models" simlayer chat -m /models/model.gguf

FROM rust:1-bullseye AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ libclang-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin simlayer-run --features portable && cargo xtask dist --portable --out /dist \
    && strip target/release/simlayer-run

FROM debian:bullseye-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libstdc++6 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/simlayer-run /usr/bin/
COPY --from=build /dist/lib /usr/lib/simlayer
COPY --from=build /dist/include /usr/include/simlayer
COPY --from=build /dist/LICENSE /dist/THIRD-PARTY /usr/share/doc/simlayer/
COPY profiles /usr/share/simlayer/profiles
ENTRYPOINT ["simlayer-run"]
