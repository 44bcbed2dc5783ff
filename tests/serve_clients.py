"""What programs of others ask of `simlayer-run serve`: the openai and ollama clients, as they come from pip.

python serve_clients.py URL KEY, with both on PYTHONPATH. Prints one line for each thing that was checked; anything that is not
as it should be ends it.
"""

import json
import sys
import threading
import time
import urllib.request

import ollama
import openai
from openai import OpenAI

url, key = sys.argv[1:3]
client = OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60)
model = client.models.list().data[0].id
greedy = {"model": model, "temperature": 0, "seed": 1}
sea = [{"role": "user", "content": "Say one sentence about the sea."}]


def passed(what, start):
    print(f"ok: {what} ({time.monotonic() - start:.1f} s)", flush=True)


def metric(name):
    request = urllib.request.Request(url + "/metrics", headers={"Authorization": "Bearer " + key})
    lines = urllib.request.urlopen(request).read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


def chat():
    answer = client.chat.completions.create(messages=sea, max_tokens=24, **greedy)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and len(choice.message.content) > 10, answer
    assert choice.finish_reason in ("stop", "length"), answer
    assert answer.usage.prompt_tokens > 10 and 0 < answer.usage.completion_tokens <= 24, answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    extra = answer.model_dump()
    assert extra["timings"]["prompt_n"] + extra["timings"]["cache_n"] == answer.usage.prompt_tokens, extra["timings"]
    kv = extra["usage"]["kv"]
    assert kv["allocated_bytes"] > 0 and kv["f16_bytes"] > 0 and kv["active_layers"] + kv["lazy_layers"] == 30, kv
    return choice.message.content


def streaming():
    def say(messages):
        stream = client.chat.completions.create(
            messages=messages, max_tokens=24, stream=True, stream_options={"include_usage": True}, **greedy
        )
        chunks = list(stream)
        assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices, chunks[-1]
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert sum(bool(piece) for piece in pieces) > 3, "it comes piece by piece"
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert reasons[-1] in ("stop", "length") and not any(reasons[:-1]), reasons
        return "".join(pieces), chunks[-1].usage

    said, _ = say(sea)
    # The conversation goes on, and what is known of it is not read again.
    turn = sea + [{"role": "assistant", "content": said}, {"role": "user", "content": "And one more."}]
    more, usage = say(turn)
    assert more and usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens // 2, usage


def stop():
    text = client.completions.create(prompt="one two three four five six", max_tokens=16, **greedy)
    said = text.choices[0].text
    word = said.split()[2]
    cut = client.completions.create(prompt="one two three four five six", max_tokens=16, stop=[word], **greedy)
    assert cut.choices[0].text == said[: said.index(word)] and cut.choices[0].finish_reason == "stop", (said, cut)
    pieces = client.completions.create(prompt="one two three four five six", max_tokens=16, stop=word, stream=True, **greedy)
    assert "".join(piece.choices[0].text for piece in pieces) == cut.choices[0].text


weather = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}


def tools():
    ask = [{"role": "user", "content": "How is the weather in Oslo for the next 2 days?"}]
    first = client.chat.completions.create(
        messages=ask, tools=[weather], tool_choice="required", max_tokens=80, **greedy
    )
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls", first
    call = choice.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather" and call.id and arguments["city"] in ("Oslo", "Rome"), call
    assert isinstance(arguments["days"], int), arguments
    # The result goes back, and an answer comes.
    ask += [choice.message.model_dump(exclude_none=True)]
    ask += [{"role": "tool", "tool_call_id": call.id, "content": json.dumps({"sky": "clear", "degrees": 21})}]
    second = client.chat.completions.create(messages=ask, tools=[weather], tool_choice="none", max_tokens=16, **greedy)
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls, second
    # Piece by piece: the name first, then the arguments.
    stream = client.chat.completions.create(
        messages=ask[:1], tools=[weather], tool_choice="required", max_tokens=80, stream=True, **greedy
    )
    names, texts, reason = {}, {}, None
    for chunk in stream:
        reason = chunk.choices[0].finish_reason or reason
        for delta in chunk.choices[0].delta.tool_calls or []:
            names[delta.index] = names.get(delta.index, "") + (delta.function.name or "")
            texts[delta.index] = texts.get(delta.index, "") + (delta.function.arguments or "")
    assert reason == "tool_calls" and set(names.values()) == {"weather"}, (reason, names)
    assert all(json.loads(text)["city"] in ("Oslo", "Rome") for text in texts.values()), texts


def schema():
    wanted = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "Make up a person."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": wanted, "strict": True}},
        max_tokens=60,
        **greedy,
    )
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age"} and isinstance(person["age"], int), person


def logprobs():
    answer = client.chat.completions.create(messages=sea, max_tokens=4, logprobs=True, top_logprobs=3, **greedy)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        # The most probable token is the one that is taken.
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].logprob == token.logprob
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob


def two_answers():
    def ask():
        answer = client.chat.completions.create(messages=sea, max_tokens=16, n=2, temperature=1.5, seed=7, model=model)
        assert [choice.index for choice in answer.choices] == [0, 1]
        return [choice.message.content for choice in answer.choices]

    first, second = ask()
    assert first and second and first != second, "two seeds give two answers"


def cancellation():
    cancelled = metric("simlayer:cancelled_total")
    stream = client.chat.completions.create(
        messages=sea, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}, **greedy
    )
    for index, _ in enumerate(stream):
        if index == 3:
            break
    stream.close()
    for _ in range(100):
        if metric("simlayer:cancelled_total") == cancelled + 1 and metric("llamacpp:requests_processing") == 0:
            return
        time.sleep(0.05)
    raise AssertionError("the answer goes on though nobody waits for it")


def refused():
    try:
        OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0).models.list()
        raise AssertionError("a wrong key is taken")
    except openai.AuthenticationError as error:
        assert error.status_code == 401 and "key" in str(error), error
    try:
        long = [{"role": "user", "content": "the sea " * 6000}]
        client.chat.completions.create(messages=long, max_tokens=4, **greedy)
        raise AssertionError("a prompt that is too long is taken")
    except openai.BadRequestError as error:
        assert error.body["type"] == "exceed_context_size_error" and error.body["n_ctx"] < 9000, error.body
    for wrong in [{"temperature": "hot"}, {"n": 1000}, {"response_format": {"type": "xml"}}]:
        try:
            client.chat.completions.create(model=model, messages=sea, max_tokens=4, extra_body=wrong)
            raise AssertionError(f"{wrong} is taken")
        except openai.BadRequestError as error:
            assert error.body["param"] == next(iter(wrong)), error.body


def embeddings():
    two = client.embeddings.create(model=model, input=["The sea is blue.", "The sea is blue."])
    first, second = (one.embedding for one in two.data)
    assert len(first) == 576 and abs(sum(x * x for x in first) - 1) < 1e-3
    assert sum(a * b for a, b in zip(first, second)) > 0.999


def together():
    """Several clients at once are each told what they are told alone."""
    words = ["apple", "river", "stone", "cloud"]

    def ask(word, said):
        text = client.completions.create(prompt=" ".join([word] * 6), max_tokens=8, **greedy)
        said[word] = text.choices[0].text

    alone, together = {}, {}
    for word in words:
        ask(word, alone)
    threads = [threading.Thread(target=ask, args=[word, together]) for word in words]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert together == alone and len(set(alone.values())) == 4, (alone, together)


def ollamas():
    client = ollama.Client(host=url, headers={"Authorization": "Bearer " + key})
    models = client.list().models
    assert [one.model for one in models] == [model], models
    options = {"temperature": 0, "num_predict": 16}
    answer = client.chat(model=model, messages=sea, options=options)
    assert answer.done and answer.message.content and answer.eval_count <= 16, answer
    pieces = list(client.chat(model=model, messages=sea, options=options, stream=True))
    assert len(pieces) > 3 and pieces[-1].done and not any(piece.done for piece in pieces[:-1])
    assert client.generate(model=model, prompt="Say hello.", options=options).response
    person = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    answer = client.chat(model=model, messages=sea, format=person, options={"temperature": 0, "num_predict": 40})
    assert isinstance(json.loads(answer.message.content)["age"], int), answer


checks = [chat, streaming, stop, tools, schema, logprobs, two_answers, cancellation, refused, embeddings, together, ollamas]
for check in checks:
    start = time.monotonic()
    check()
    passed(check.__name__, start)
