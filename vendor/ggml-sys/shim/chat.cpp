#include "chat.h"

#include "stack.h"
#include "vocab.h"

// llama.cpp's, not the one above.
#include "common/chat.h"
#include "common/json-schema-to-grammar.h"
#include "common/log.h"

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <exception>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// Their parsers of templates and of answers, and what runs templates, recurse as deep as their input is nested, and a
// template or a schema of some lines can keep them busy for ever. The compiler makes each of their functions call
// __cyg_profile_func_enter first (-finstrument-functions), which looks at the stack and counts.
//
// Destructors must not throw, so that they are left out. What they recurse over is as deep as the input is long, and
// that is bounded.

namespace simlayer {
namespace {

// Some seconds. Templates of models take some ten thousand calls, long tool lists some millions.
constexpr uint64_t MAX_CALLS = 100000000;
// The time is asked for once in so many calls.
constexpr uint64_t CALLS_PER_LOOK = 1024;
constexpr double   MAX_SECONDS    = 5;

// Their frames are some hundred bytes for each character of nesting: with these the long stack is enough.
constexpr size_t MAX_TEMPLATE = 128 << 10;
constexpr size_t MAX_SCHEMA   = 1 << 20;
constexpr size_t MAX_REQUEST  = 64 << 20;
// For destructors below the deepest place.
constexpr size_t LONG_RESERVE = 64 << 20;

double thread_seconds() {
    timespec time;
    return clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0 ? double(time.tv_sec) + 1e-9 * double(time.tv_nsec) : 0;
}

// What one call of theirs may use up.
struct call_bounds {
    const char * floor;
    double       until     = thread_seconds() + MAX_SECONDS;
    uint64_t     calls     = 0;
    bool         exhausted = false;
    bool         endless   = false;

    bool reached() const { return exhausted || endless; }
};

thread_local call_bounds * bounds = nullptr;

// Their code turns exceptions into others, or goes on after them. So it is the bounds that say what has happened.
template <typename Body> void within(call_bounds & limit, const Body & body) {
    struct scope {
        explicit scope(call_bounds * limit) { bounds = limit; }
        ~scope() { bounds = nullptr; }
    } in_scope(&limit);
    try {
        body();
    } catch (...) {
        if (!limit.reached()) {
            throw;
        }
    }
    if (limit.endless) {
        throw std::runtime_error("it takes too long: it repeats, branches or refers to itself without end");
    }
    if (limit.exhausted) {
        throw stack_exhausted("it is nested too deeply");
    }
}

// Not on this thread's own stack, however short the text is: where its end is met within a function that throws nothing, the
// exception would end the process.
template <typename Body> void bounded(const Body & body) {
    on_long_stack([&] {
        call_bounds limit{ stack_floor() + LONG_RESERVE };
        within(limit, body);
    });
}

void check_size(const char * what, size_t size, size_t most) {
    if (size > most) {
        throw std::runtime_error(std::string(what) + " has " + std::to_string(size) + " bytes, and at most " +
                                 std::to_string(most) + " are read");
    }
}

// Runs `body` as simlayer_guarded does and returns what it makes, or NULL.
template <typename Body> auto guarded(char * error, size_t error_size, Body body) -> decltype(body().release()) {
    struct job {
        Body &            body;
        decltype(body())  made;
    } job{ body, nullptr };
    simlayer_guarded([](void * data) {
        auto & at = *static_cast<struct job *>(data);
        at.made   = at.body();
    }, &job, error, error_size);
    return job.made.release();
}

} // namespace
} // namespace simlayer

extern "C" __attribute__((no_instrument_function)) void __cyg_profile_func_enter(void *, void *) {
    simlayer::call_bounds * limit = simlayer::bounds;
    // While an exception is on its way out, another one would end the process.
    if (!limit || std::uncaught_exceptions() > 0) {
        return;
    }
    limit->calls++;
    if (static_cast<const char *>(__builtin_frame_address(0)) < limit->floor) {
        limit->exhausted = true;
    } else if (limit->calls > simlayer::MAX_CALLS ||
               (limit->calls % simlayer::CALLS_PER_LOOK == 0 && simlayer::thread_seconds() > limit->until)) {
        limit->endless = true;
    }
    // Whoever catches it does not get far.
    if (limit->reached()) {
        throw std::runtime_error("a bound is reached");
    }
}

extern "C" __attribute__((no_instrument_function)) void __cyg_profile_func_exit(void *, void *) {}

struct simlayer_text {
    std::string text;
};

struct simlayer_chat {
    common_chat_templates_ptr templates;
};

struct simlayer_chat_prepared {
    common_chat_params        params;
    common_chat_parser_params parser;
};

using simlayer::bounded;
using simlayer::check_size;
using simlayer::guarded;

using text_ptr = std::unique_ptr<simlayer_text>;

static text_ptr text_of(std::string text) {
    return text_ptr(new simlayer_text{ std::move(text) });
}

// What models answer may be cut inside of a character.
static text_ptr text_of(const common_json & json) {
    return text_of(json.dump_safe());
}

extern "C" const char * simlayer_text_data(const struct simlayer_text * text) {
    return text->text.data();
}

extern "C" size_t simlayer_text_size(const struct simlayer_text * text) {
    return text->text.size();
}

extern "C" void simlayer_text_free(struct simlayer_text * text) {
    delete text;
}

extern "C" struct simlayer_text * simlayer_json_schema_to_grammar(const char * schema, size_t size, char * error,
                                                                  size_t error_size) {
    return guarded(error, error_size, [&] {
        check_size("the schema", size, simlayer::MAX_SCHEMA);
        text_ptr made;
        bounded([&] { made = text_of(json_schema_to_grammar(common_json::parse(std::string(schema, size)))); });
        return made;
    });
}

extern "C" struct simlayer_chat * simlayer_chat_new(const char * source, size_t source_size, const char * bos,
                                                    size_t bos_size, const char * eos, size_t eos_size, char * error,
                                                    size_t error_size) {
    return guarded(error, error_size, [&] {
        check_size("the template", source_size, simlayer::MAX_TEMPLATE);
        const std::string text(source, source_size);
        if (text.empty()) {
            throw std::runtime_error("the template is empty");
        }
        auto made = std::make_unique<simlayer_chat>();
        bounded([&] {
            try {
                made->templates =
                    common_chat_templates_init(nullptr, text, std::string(bos, bos_size), std::string(eos, eos_size));
            } catch (const std::exception &) {
                if (simlayer::bounds->reached()) {
                    throw;
                }
                // Its message is lost in llama.cpp; the same again, to get it.
                common_chat_template again(text, std::string(bos, bos_size), std::string(eos, eos_size));
                throw;
            }
        });
        return made;
    });
}

extern "C" void simlayer_chat_free(struct simlayer_chat * chat) {
    char error[1];
    simlayer_guarded([](void * data) {
        simlayer::on_long_stack([&] { delete static_cast<simlayer_chat *>(data); });
    }, chat, error, sizeof(error));
}

extern "C" struct simlayer_text * simlayer_chat_capabilities(const struct simlayer_chat * chat, char * error,
                                                             size_t error_size) {
    return guarded(error, error_size, [&] {
        text_ptr made;
        bounded([&] {
            auto capabilities = common_chat_templates_get_caps(chat->templates.get());
            capabilities["supports_thinking"] = common_chat_templates_support_enable_thinking(chat->templates.get());
            made                              = text_of(common_json(capabilities));
        });
        return made;
    });
}

// The fields are those of OpenAI's chat completions where there are such: `messages`, `tools`, `tool_choice` (a string),
// `parallel_tool_calls`; and llama.cpp's: `json_schema` (an object, or null), `grammar`, `reasoning_format`,
// `enable_thinking`, `chat_template_kwargs` (an object), `add_generation_prompt`, `continue_final_message`. All must be
// there.
extern "C" struct simlayer_chat_prepared * simlayer_chat_apply(const struct simlayer_chat * chat, const char * request,
                                                               size_t size, char * error, size_t error_size) {
    return guarded(error, error_size, [&] {
        check_size("the request", size, simlayer::MAX_REQUEST);
        auto made = std::make_unique<simlayer_chat_prepared>();
        bounded([&] {
            const common_json given = common_json::parse(std::string(request, size));

            common_chat_templates_inputs inputs;
            inputs.messages    = common_chat_msgs_parse_oaicompat(given.at("messages"));
            inputs.tools       = common_chat_tools_parse_oaicompat(given.at("tools"));
            inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(given.at("tool_choice").get<std::string>());
            inputs.parallel_tool_calls = given.at("parallel_tool_calls").get<bool>();
            inputs.json_schema         = given.at("json_schema").is_null() ? "" : given.at("json_schema").dump();
            inputs.grammar             = given.at("grammar").get<std::string>();
            inputs.reasoning_format =
                common_reasoning_format_from_name(given.at("reasoning_format").get<std::string>());
            inputs.enable_thinking       = given.at("enable_thinking").get<bool>();
            inputs.add_generation_prompt = given.at("add_generation_prompt").get<bool>();
            if (given.at("continue_final_message").get<bool>()) {
                inputs.continue_final_message = COMMON_CHAT_CONTINUATION_AUTO;
            }
            for (const auto & [name, value] : given.at("chat_template_kwargs").items()) {
                inputs.chat_template_kwargs[name] = value.dump();
            }

            made->params                  = common_chat_templates_apply(chat->templates.get(), inputs);
            made->parser                  = common_chat_parser_params(made->params);
            made->parser.reasoning_format = inputs.reasoning_format;
            made->parser.is_continuation  = inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE;
            if (!made->params.parser.empty()) {
                made->parser.parser.load(made->params.parser);
            }
        });
        return made;
    });
}

extern "C" void simlayer_chat_prepared_free(struct simlayer_chat_prepared * prepared) {
    delete prepared;
}

extern "C" struct simlayer_text * simlayer_chat_prepared_json(const struct simlayer_chat_prepared * prepared,
                                                              char * error, size_t error_size) {
    return guarded(error, error_size, [&] {
        const common_chat_params & params   = prepared->params;
        common_json                triggers = common_json::array();
        for (const auto & trigger : params.grammar_triggers) {
            static const char * const kinds[] = { "token", "word", "pattern", "pattern_full" };
            triggers.push_back({ { "kind", kinds[trigger.type] }, { "value", trigger.value } });
        }
        return text_of(common_json{
            { "format", common_chat_format_name(params.format) },
            { "prompt", params.prompt },
            { "generation_prompt", params.generation_prompt },
            { "grammar", params.grammar },
            { "grammar_lazy", params.grammar_lazy },
            { "grammar_triggers", triggers },
            { "preserved_tokens", params.preserved_tokens },
            { "additional_stops", params.additional_stops },
            { "supports_thinking", params.supports_thinking },
            { "thinking_start", params.thinking_start_tag },
            { "thinking_ends", params.thinking_end_tags },
        });
    });
}

extern "C" struct simlayer_text * simlayer_chat_parse(const struct simlayer_chat_prepared * prepared, const char * text,
                                                      size_t size, bool is_partial, char * error, size_t error_size) {
    return guarded(error, error_size, [&] {
        text_ptr made;
        bounded([&] {
            const common_chat_msg message = common_chat_parse(std::string(text, size), is_partial, prepared->parser);
            common_json           calls   = common_json::array();
            for (const auto & call : message.tool_calls) {
                calls.push_back({ { "id", call.id }, { "name", call.name }, { "arguments", call.arguments } });
            }
            made = text_of(common_json{
                { "content", message.render_content() },
                { "reasoning_content", message.reasoning_content },
                { "tool_calls", calls },
            });
        });
        return made;
    });
}

static common_chat_msg read_message(const char * text, size_t size) {
    const common_json json = common_json::parse(std::string(text, size));
    common_chat_msg   message;
    message.content           = json.at("content").get<std::string>();
    message.reasoning_content = json.at("reasoning_content").get<std::string>();
    for (const auto & call : json.at("tool_calls")) {
        message.tool_calls.push_back({ call.at("name").get<std::string>(), call.at("arguments").get<std::string>(),
                                       call.at("id").get<std::string>() });
    }
    return message;
}

extern "C" struct simlayer_text * simlayer_chat_diff(const char * before, size_t before_size, const char * after,
                                                     size_t after_size, char * error, size_t error_size) {
    return guarded(error, error_size, [&] {
        common_json diffs = common_json::array();
        for (const auto & diff : common_chat_msg_diff::compute_diffs(read_message(before, before_size),
                                                                     read_message(after, after_size))) {
            common_json json{
                { "content", diff.content_delta },
                { "reasoning_content", diff.reasoning_content_delta },
                { "tool_call", nullptr },
            };
            if (diff.tool_call_index != std::string::npos) {
                json["tool_call"] = common_json{
                    { "index", diff.tool_call_index },
                    { "id", diff.tool_call_delta.id },
                    { "name", diff.tool_call_delta.name },
                    { "arguments", diff.tool_call_delta.arguments },
                };
            }
            diffs.push_back(std::move(json));
        }
        return text_of(diffs);
    });
}

// What these files need of llama.cpp's common.cpp and log.cpp, which need all of llama.cpp. Nothing is logged: what is
// wrong is in the errors.

int common_log_get_verbosity_thold() {
    return LOG_LEVEL_OUTPUT - 1;
}

struct common_log * common_log_main() {
    return nullptr;
}

void common_log_add(struct common_log *, enum ggml_log_level, const char *, ...) {}

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string joined;
    for (size_t i = 0; i < values.size(); i++) {
        joined += i > 0 ? separator : "";
        joined += values[i];
    }
    return joined;
}

std::vector<std::string> string_split(const std::string & text, const std::string & delimiter) {
    std::vector<std::string> parts;
    size_t                   start = 0;
    for (size_t end; (end = text.find(delimiter, start)) != std::string::npos; start = end + delimiter.size()) {
        parts.push_back(text.substr(start, end - start));
    }
    parts.push_back(text.substr(start));
    return parts;
}

std::string string_repeat(const std::string & text, size_t n) {
    std::string repeated;
    repeated.reserve(n * text.size());
    for (size_t i = 0; i < n; i++) {
        repeated += text;
    }
    return repeated;
}

void string_replace_all(std::string & text, const std::string & search, const std::string & replace) {
    if (search.empty()) {
        return;
    }
    for (size_t at = 0; (at = text.find(search, at)) != std::string::npos; at += replace.size()) {
        text.replace(at, search.size(), replace);
    }
}

// Only ever called with a vocabulary, or a model, of which these files are given none.
llama_tokens common_tokenize(const llama_vocab *, const std::string &, bool, bool) {
    throw std::logic_error("templates have no vocabulary here");
}

std::string common_token_to_piece(const llama_vocab *, llama_token, bool) {
    throw std::logic_error("templates have no vocabulary here");
}

// As in vocab.cpp: for the linker, and weak.
#define SIMLAYER_WEAK extern "C" __attribute__((weak))

SIMLAYER_WEAK const char * llama_model_chat_template(const struct llama_model *, const char *) { return nullptr; }
SIMLAYER_WEAK int32_t llama_chat_apply_template(const char *, const struct llama_chat_message *, size_t, bool, char *,
                                                int32_t) { return -1; }
