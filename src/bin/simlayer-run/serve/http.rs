//! Connections: how long a client may take, how much it may send, who may ask, and one line in the log for each request.

use std::{
    fmt::Write as _,
    hash::{DefaultHasher, Hash, Hasher},
    io, mem,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{FromRequest, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use serde_json::{Map, Value};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    time::{Sleep, sleep, timeout},
};

use super::{
    app::{App, LARGE_BODY},
    error::ApiError,
};

/// Connections at once.
const MOST_CONNECTIONS: usize = 1024;
/// How long a client may take to send a request's headers.
const HEADERS: Duration = Duration::from_secs(15);
const MOST_HEADERS: usize = 100;
const HEADER_BYTES: usize = 64 << 10;
/// How long open connections may take to end once the server is to stop.
const FAREWELL: Duration = Duration::from_secs(12);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.response()
    }
}

/// Where clients come from.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Who asks: a number that is the same for all connections of a client.
#[derive(Debug, Clone, Copy)]
pub struct Client(pub u64);

/// Serves until `stop` is set, and then those who are being answered.
pub async fn serve(listener: Listener, router: Router, app: Arc<App>, stop: Arc<AtomicBool>) {
    let graceful = GracefulShutdown::new();
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    while !stop.load(Ordering::SeqCst) {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { break };
        // Looks at the flag from time to time.
        let accepted = timeout(Duration::from_millis(100), async {
            match &listener {
                Listener::Tcp(listener) => listener.accept().await.map(|(stream, from)| {
                    let _ = stream.set_nodelay(true);
                    (Socket::Tcp(stream), Some(from.ip()))
                }),
                Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| (Socket::Unix(stream), None)),
            }
        });
        let (socket, from) = match accepted.await {
            Ok(Ok(accepted)) => accepted,
            // Out of file descriptors: those who are here will go.
            Ok(Err(_)) => {
                sleep(Duration::from_millis(50)).await;
                continue;
            }
            Err(_) => continue,
        };
        let service = TowerToHyperService::new(router.clone());
        let service = hyper::service::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(From_(from));
            hyper::service::Service::call(&service, request)
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEADERS).max_headers(MOST_HEADERS).max_buf_size(HEADER_BYTES);
        let socket = TokioIo::new(Timed { socket, limit: app.settings.timeout, waits: None });
        let connection = graceful.watch(http.serve_connection(socket, service));
        tokio::spawn(async move {
            // A client that goes away, or is no client, is nothing to tell.
            let _ = connection.await;
            drop(permit);
        });
    }
    let _ = timeout(FAREWELL, graceful.shutdown()).await;
}

/// The address that a connection comes from.
#[derive(Debug, Clone, Copy)]
struct From_(Option<IpAddr>);

#[derive(Debug)]
enum Socket {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

/// A connection whose client must take what it is sent within some time.
#[derive(Debug)]
struct Timed {
    socket: Socket,
    limit: Duration,
    waits: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for Timed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_read(cx, to),
            Socket::Unix(socket) => Pin::new(socket).poll_read(cx, to),
        }
    }
}

impl Timed {
    fn within<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.waits = None;
            return result;
        }
        let limit = self.limit;
        let waits = self.waits.get_or_insert_with(|| Box::pin(sleep(limit)));
        match waits.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let result = match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_write(cx, from),
            Socket::Unix(socket) => Pin::new(socket).poll_write(cx, from),
        };
        self.within(cx, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_flush(cx),
            Socket::Unix(socket) => Pin::new(socket).poll_flush(cx),
        };
        self.within(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Socket::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}

/// A request's line in the log, which is written when the last of what answers it is gone.
#[derive(Debug)]
pub struct LogLine {
    start: Instant,
    method: Method,
    path: String,
    client: String,
    told: Mutex<(Option<StatusCode>, String)>,
    is_quiet: bool,
}

impl LogLine {
    /// Adds what is to be known of the request.
    pub fn add(&self, text: std::fmt::Arguments<'_>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = told.1.write_fmt(text);
    }

    fn status(&self, status: StatusCode) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(status);
    }
}

impl Drop for LogLine {
    fn drop(&mut self) {
        let (status, text) = &*self.told.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Who looks whether the server is well does so all the time.
        if self.is_quiet && status.is_some_and(|status| status.is_success()) {
            return;
        }
        let status = status.map_or("gone".to_owned(), |status| status.as_u16().to_string());
        let path = if self.path.is_ascii() { self.path.clone() } else { self.path.escape_default().to_string() };
        eprintln!(
            "{} {} {} {path} {status} {:.0} ms{text}",
            jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ"),
            self.client,
            self.method,
            self.start.elapsed().as_secs_f64() * 1e3,
        );
    }
}

const QUIET: [&str; 4] = ["/health", "/v1/health", "/metrics", "/slots"];
/// What may be asked without a key.
const OPEN: [&str; 4] = ["/", "/health", "/v1/health", "/favicon.ico"];

/// Who may ask, what their answers' headers are, and the log.
pub async fn gate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let from = request.extensions().get::<From_>().and_then(|from| from.0);
    let path = request.uri().path().to_owned();
    let log = Arc::new(LogLine {
        start: Instant::now(),
        method: request.method().clone(),
        path: path.chars().take(100).collect(),
        client: from.map_or_else(|| "-".to_owned(), |from| from.to_string()),
        told: Mutex::default(),
        is_quiet: QUIET.contains(&&*path),
    });
    let origin = request.headers().get(header::ORIGIN).cloned();
    let key = key(request.headers()).map(str::to_owned);
    let mut hasher = DefaultHasher::new();
    (from, &key).hash(&mut hasher);
    request.extensions_mut().insert(Client(hasher.finish()));
    request.extensions_mut().insert(Arc::clone(&log));
    let is_open = OPEN.contains(&&*path) || path.starts_with("/page/") || request.method() == Method::OPTIONS;
    let is_known = app.settings.keys.is_empty() || key.as_deref().is_some_and(|key| is_one_of(key, &app.settings.keys));
    let mut response = if !is_known && !is_open {
        let message =
            "the key is wrong or missing: send one that the server was started with (Authorization: Bearer KEY)";
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message).response()
    } else if request.method() == Method::OPTIONS {
        StatusCode::NO_CONTENT.into_response()
    } else {
        next.run(request).await
    };
    if let Some(allowed) = origin.and_then(|origin| allowed(&origin, &app.settings.cors_origins)) {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("*, Authorization"));
    }
    response.headers_mut().insert(header::SERVER, HeaderValue::from_static("simlayer"));
    log.status(response.status());
    response
}

/// The Origin header's value, where scripts from there may see the answer.
fn allowed(origin: &HeaderValue, origins: &[String]) -> Option<HeaderValue> {
    let is_one = |allowed: &String| allowed == "*" || allowed.as_bytes() == origin.as_bytes();
    origins.iter().any(is_one).then(|| origin.clone())
}

/// The key that a client sends: as OpenAI's and Ollama's clients do, or as Anthropic's.
fn key(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|value| value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer ")));
    bearer.or_else(|| headers.get("x-api-key").and_then(|value| value.to_str().ok())).map(str::trim)
}

/// Looks at all of all keys, so that the time that it takes tells nothing of them.
fn is_one_of(key: &str, keys: &[String]) -> bool {
    let is_same = |known: &str| {
        let bytes = known.bytes().zip(key.bytes().chain(std::iter::repeat(0)));
        (bytes.fold(0, |differs, (a, b)| differs | (a ^ b)) == 0) & (known.len() == key.len())
    };
    keys.iter().fold(false, |is_known, known| is_known | is_same(known))
}

/// A request as the API's handlers take it.
#[derive(Debug)]
pub struct Asked {
    pub app: Arc<App>,
    pub client: Client,
    pub log: Arc<LogLine>,
    headers: HeaderMap,
    body: Body,
}

impl FromRequest<Arc<App>> for Asked {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Asked, ApiError> {
        let (mut parts, body) = request.into_parts();
        let (client, log) = (parts.extensions.remove::<Client>(), parts.extensions.remove::<Arc<LogLine>>());
        // `gate` has put them there.
        let (Some(client), Some(log)) = (client, log) else {
            return Err(ApiError::internal("the request has not come through the gate"));
        };
        Ok(Asked { app: Arc::clone(app), client, log, headers: parts.headers, body })
    }
}

impl Asked {
    /// The body, which has to be a JSON object; to be asked for once.
    pub async fn json(&mut self) -> Result<Map<String, Value>, ApiError> {
        read_json(&self.app, mem::take(&mut self.body), &self.headers).await
    }
}

/// A request's body as JSON.
async fn read_json(app: &App, body: Body, headers: &HeaderMap) -> Result<Map<String, Value>, ApiError> {
    let bytes = read_body(app, body, headers).await?;
    if bytes.is_empty() {
        return Err(ApiError::bad("the request has no body: send a JSON object"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        ApiError::bad(format!("the body is not valid UTF-8 from byte {} on: send JSON in UTF-8", error.valid_up_to()))
    })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ApiError::bad("the body is no JSON object")),
        Err(error) => Err(ApiError::bad(format!("the body is no JSON: {error}"))),
    }
}

async fn read_body(app: &App, body: Body, headers: &HeaderMap) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message =
            format!("the body is larger than {} bytes: send less, or raise --max-body", app.settings.max_body);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    };
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > app.settings.max_body as u64) {
        return Err(too_large());
    }
    let late = |_| {
        let message = format!("the body did not come within {} seconds (--timeout)", app.settings.timeout.as_secs());
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    };
    let read = async {
        // A length that nobody knows may be large.
        let is_large = length.is_none_or(|length| length > LARGE_BODY as u64);
        let _permit = if is_large { app.large_bodies.acquire().await.ok() } else { None };
        axum::body::to_bytes(body, app.settings.max_body).await
    };
    timeout(app.settings.timeout, read).await.map_err(late)?.map_err(|error| {
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = cause {
            if error.to_string().contains("length limit exceeded") {
                return too_large();
            }
            cause = error.source();
        }
        ApiError::bad(format!("the body could not be read: {error}"))
    })
}

/// A JSON answer.
pub fn json(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}
