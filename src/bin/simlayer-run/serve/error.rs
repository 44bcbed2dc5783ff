//! What a client is told when its request is not answered: a status, OpenAI's kind of error object, and what to do.

use axum::{
    body::Body,
    http::{Response, StatusCode, header},
};
use serde_json::{Value, json};
use simlayer::{chat::ChatError, sampling::SamplingError, vocab::VocabError};

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    /// OpenAI's name of the kind.
    pub kind: &'static str,
    pub message: String,
    /// The member of the request that is wrong.
    pub param: Option<String>,
    /// Further members of the error object.
    more: Vec<(&'static str, Value)>,
}

impl ApiError {
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, kind, message: message.into(), param: None, more: Vec::new() }
    }

    /// The request is wrong.
    pub fn bad(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// This member of the request is wrong.
    pub fn param(param: impl Into<String>, message: impl std::fmt::Display) -> ApiError {
        let param = param.into();
        ApiError { param: Some(param.clone()), ..ApiError::bad(format!("{param}: {message}")) }
    }

    pub fn not_supported(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_IMPLEMENTED, "not_supported_error", message)
    }

    /// Not now: the client may try again.
    pub fn busy(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", message)
    }

    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// As llama-server tells it, which clients know.
    pub fn context(needed: usize, n_ctx: usize) -> ApiError {
        let message = format!(
            "the prompt has {needed} tokens, but the context holds only {n_ctx}: send less, or start the server with a \
             larger -c"
        );
        ApiError {
            more: vec![("n_prompt_tokens", needed.into()), ("n_ctx", n_ctx.into())],
            ..ApiError::new(StatusCode::BAD_REQUEST, "exceed_context_size_error", message)
        }
    }

    /// The error object.
    pub fn object(&self) -> Value {
        let mut object = json!({
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.status.as_u16(),
        });
        for (name, value) in &self.more {
            object[name] = value.clone();
        }
        object
    }

    pub fn response(&self) -> Response<Body> {
        let body = json!({ "error": self.object() }).to_string();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("2"));
        }
        response
    }
}

impl From<ChatError> for ApiError {
    fn from(error: ChatError) -> ApiError {
        ApiError::param("messages", error)
    }
}

impl From<VocabError> for ApiError {
    fn from(error: VocabError) -> ApiError {
        ApiError::bad(error.to_string())
    }
}

impl From<SamplingError> for ApiError {
    fn from(error: SamplingError) -> ApiError {
        match error {
            SamplingError::Parameter { name, .. } => ApiError::param(name, error),
            SamplingError::Grammar(_) => ApiError::param("grammar", error),
            error => ApiError::internal(error.to_string()),
        }
    }
}
