//! Verbs about images.

use std::path::Path;

use lathe_shard::Bytes;

use crate::api::wire::{ImageList, ImageView, Removed};
use crate::cli::args::{ImageFormat, ImageVerb};
use crate::cli::client::Client;
use crate::cli::output::{Table, print, print_json, say};
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

fn image_path(name: &str) -> Result<String, Problem> {
    let fine = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if fine {
        return Ok(format!("/v1/images/{name}"));
    }
    Err(Problem::new(Kind::BadRequest, "bad-name", format!("`{name}` cannot be the name of an image"))
        .detail("names have 1 to 64 of a-z A-Z 0-9 - _ ."))
}

fn format_of(file: &Path) -> ImageFormat {
    if file.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("tar")) {
        ImageFormat::Tar
    } else {
        ImageFormat::Raw
    }
}

/// `lathe image …`.
pub async fn image(client: &Client, json: bool, verb: ImageVerb) -> Verdict {
    match verb {
        ImageVerb::Import { name, file, format } => {
            let format = match format.unwrap_or_else(|| format_of(&file)) {
                ImageFormat::Raw => "raw",
                ImageFormat::Tar => "tar",
            };
            let path = format!("{}?format={format}", image_path(&name)?);
            let view: ImageView = client.upload(&path, &file).await?;
            if json {
                print_json(&view)?;
            } else {
                print(&format!(
                    "{}   {} {}, {} on disk\n",
                    view.name,
                    Bytes(view.size_bytes),
                    view.format,
                    Bytes(view.occupied_bytes)
                ));
                say(&format!("Start a machine from it: lathe run NAME --image {}", view.name));
            }
        }
        ImageVerb::List => {
            let list: ImageList = client.get("/v1/images").await?;
            if json {
                print_json(&list)?;
            } else if list.images.is_empty() {
                say("No images yet. Import one: lathe image import NAME FILE");
            } else {
                print(&table(&list.images));
            }
        }
        ImageVerb::Rm { name } => {
            let removed: Removed = client.delete(&image_path(&name)?).await?;
            if json { print_json(&removed)? } else { print(&format!("{}   removed\n", removed.name)) }
        }
    }
    Ok(exit::DONE)
}

fn table(images: &[ImageView]) -> String {
    let mut table = Table::new(&["NAME", "FORMAT", "SIZE", "ON DISK", "SHA256"]);
    for image in images {
        let short: String = image.sha256.chars().take(12).collect();
        table.row(vec![
            image.name.clone(),
            image.format.clone(),
            Bytes(image.size_bytes).to_string(),
            Bytes(image.occupied_bytes).to_string(),
            short,
        ]);
    }
    table.render()
}
