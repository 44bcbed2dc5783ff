"""Renders chat templates as Hugging Face's Transformers does, to compare with.

Reads {"templates": {NAME: TEXT}, "cases": [{"template": NAME, "variables": {…}}, …]} from stdin and prints one
{"text": …} or {"error": …} for each case. Where llama.cpp's reading of Jinja gives another text, "as_llama_cpp" has it:
the filter `safe` does nothing there (in jinja2 what is added to such a text is escaped for HTML, JSON's quotes too), and
`tojson` writes generators as lists.
"""

import datetime
import json
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """The tag that marks the assistant's words for training: its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def tojson_of_generators(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=list
    )


def environment(as_llama_cpp):
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson_of_generators if as_llama_cpp else tojson
    if as_llama_cpp:
        env.filters["safe"] = lambda value: value
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


class Renderer:
    def __init__(self, templates, as_llama_cpp):
        self.env = environment(as_llama_cpp)
        self.templates = templates
        self.compiled = {}

    def render(self, case):
        name = case["template"]
        try:
            if name not in self.compiled:
                self.compiled[name] = self.env.from_string(self.templates[name])
            return {"text": self.compiled[name].render(**case["variables"])}
        except Exception as error:  # Whatever it is, Transformers would fail with it.
            return {"error": f"{type(error).__name__}: {error}"}


def main():
    given = json.load(sys.stdin)
    strict, lenient = (Renderer(given["templates"], as_llama_cpp) for as_llama_cpp in (False, True))
    results = []
    for case in given["cases"]:
        result, other = strict.render(case), lenient.render(case)
        if "text" in other and other != result:
            result["as_llama_cpp"] = other["text"]
        results.append(result)
    json.dump(results, sys.stdout)


main()
