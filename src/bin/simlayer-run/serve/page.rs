//! The page at `/`: files of the folder `page`, which are part of the program. They are what is served, as they are; nothing
//! builds them.

use axum::{
    Router,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
};

/// Scripts, styles and data from here only, nothing in a frame, no text taken for a script.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page.
#[derive(Debug, Clone, Copy)]
struct File {
    path: &'static str,
    content_type: &'static str,
    text: &'static str,
}

macro_rules! script {
    ($name:literal) => {
        File {
            path: concat!("/page/", $name),
            content_type: "text/javascript; charset=utf-8",
            text: include_str!(concat!("page/", $name)),
        }
    };
}

const FILES: [File; 9] = [
    File { path: "/", content_type: "text/html; charset=utf-8", text: include_str!("page/index.html") },
    File { path: "/page/style.css", content_type: "text/css; charset=utf-8", text: include_str!("page/style.css") },
    File { path: "/page/favicon.svg", content_type: "image/svg+xml", text: include_str!("page/favicon.svg") },
    script!("app.js"),
    script!("api.js"),
    script!("conversation.js"),
    script!("dom.js"),
    script!("markdown.js"),
    script!("memory.js"),
];

/// The page's files: `/`, and what is below `/page/`. Whoever may not ask the model may have them: they are no secret.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES
        .into_iter()
        .fold(Router::new(), |router, file| router.route(file.path, get(move || async move { answer(file) })))
}

fn answer(file: File) -> Response {
    let headers = [
        (header::CONTENT_TYPE, file.content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another version of the program has another page at the same address.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, file.text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_files_name_is_there() {
        let paths: Vec<&str> = FILES.iter().map(|file| file.path).collect();
        let quoted = FILES.iter().flat_map(|file| file.text.split('"'));
        let mut found = 0;
        for name in quoted {
            // Scripts name each other, the page what is below it.
            let path = match (name.strip_prefix("./"), name.strip_prefix("page/")) {
                (Some(script), _) => format!("/page/{script}"),
                (_, Some(_)) => format!("/{name}"),
                _ => continue,
            };
            assert!(paths.contains(&&*path), "{path}");
            found += 1;
        }
        assert!(found >= FILES.len() - 1, "{found}");
    }

    #[test]
    fn no_file_names_another_host_or_writes_html() {
        for file in FILES {
            for part in ["//cdn", "innerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!file.text.contains(part), "{}: {part}", file.path);
            }
            // Namespaces are names; of other addresses there are the beginnings only, in patterns.
            let addresses = file.text.split("http").skip(1).filter(|rest| {
                let rest = rest.trim_start_matches('s');
                rest.starts_with("://") && !rest.starts_with("://www.w3.org/2000/svg")
            });
            assert_eq!(addresses.count(), 0, "{}", file.path);
        }
    }

    #[test]
    fn scripts_and_styles_stand_in_files_of_their_own() {
        let html = FILES[0].text;
        // The policy would not let them run.
        for part in [" style=", " onclick=", "<style", "javascript:"] {
            assert!(!html.contains(part), "{part}");
        }
        assert!(html.split("<script").skip(1).all(|rest| rest.contains("></script>") && rest.contains("src=")));
    }
}
