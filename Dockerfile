# The image an app starts from: the runtime, `edgepipe` and nothing that compresses (no torch). Mount a bundle and run:
#   docker build -t edgepipe . && docker run --rm -v "$PWD/bundle:/bundle:ro" edgepipe targets

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY targets targets
COPY calibration calibration
COPY edgepipe edgepipe
RUN pip wheel --no-cache-dir --no-deps --wheel-dir dist .

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin edgepipe
WORKDIR /install
COPY --from=build /src/dist /src/constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt ./*.whl
USER 10001
WORKDIR /home/edgepipe
ENTRYPOINT ["edgepipe"]
