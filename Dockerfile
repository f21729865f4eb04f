# The command line on a CPU, with the tested versions. Datasets and results are in the folder that is mounted:
#   docker build --tag recbole-llm .
#   docker run --rm --volume "$PWD:/work" recbole-llm run --model=LoRACocktail --dataset=ml-100k
FROM python:3.12-slim-bookworm
COPY . /source
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu --constraint /source/constraints.txt /source \
    && pip install --no-cache-dir --no-deps "recbole==1.2.1"
WORKDIR /work
ENTRYPOINT ["recbole-llm"]
CMD ["--help"]
