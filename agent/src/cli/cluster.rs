//! Verbs about the cluster.

use std::io::Read;

use hyper::Method;

use crate::api::wire::{ClusterInit, ClusterView, JoinRequest, TokenRequest, TokenView};
use crate::cli::args::ClusterVerb;
use crate::cli::client::Client;
use crate::cli::output::{self, print, print_json, say};
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

/// Longest token that is read from standard input, bytes.
const MAX_TOKEN_BYTES: u64 = 16 << 10;

/// `lathe cluster …`.
pub async fn cluster(client: &Client, json: bool, verb: ClusterVerb) -> Verdict {
    match verb {
        ClusterVerb::Init { name, address } => {
            let view: ClusterView =
                client.send(Method::POST, "/v1/cluster/init", &ClusterInit { name, address }, None).await?;
            print_cluster(&view, json)?;
            if !json {
                say("A token for another host: lathe cluster token");
            }
        }
        ClusterVerb::Token { ttl } => {
            let view: TokenView =
                client.send(Method::POST, "/v1/cluster/token", &TokenRequest { ttl_sec: ttl }, None).await?;
            if json {
                print_json(&view)?;
            } else {
                print(&format!("{}\n", view.token));
                say(&format!(
                    "Good once, for {}. On the other host: lathe cluster join -",
                    output::duration(view.ttl_sec)
                ));
            }
        }
        ClusterVerb::Join { token, address } => {
            let token = if token == "-" { read_token()? } else { token };
            let view: ClusterView =
                client.send(Method::POST, "/v1/cluster/join", &JoinRequest { token, address }, None).await?;
            print_cluster(&view, json)?;
        }
    }
    Ok(exit::DONE)
}

fn print_cluster(view: &ClusterView, json: bool) -> Result<(), Problem> {
    if json {
        return print_json(view);
    }
    print(&format!("cluster {}   this host is {} at {}\n", view.cluster, view.node, view.address));
    Ok(())
}

fn read_token() -> Result<String, Problem> {
    let mut token = String::new();
    let read = std::io::stdin().take(MAX_TOKEN_BYTES).read_to_string(&mut token);
    match read {
        Ok(_) if !token.trim().is_empty() => Ok(token.trim().to_owned()),
        Ok(_) => Err(Problem::new(Kind::BadRequest, "usage", "no token came on standard input")
            .fix("lathe cluster token     on a host of the cluster prints one")),
        Err(error) => Err(Problem::internal("cannot read the token from standard input", error)),
    }
}
